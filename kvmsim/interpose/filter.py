"""Which system calls of a client are handed to the supervisor: a seccomp filter, as data.

A filter is a classic BPF program over ``struct seccomp_data``. :func:`program` writes it as tuples
``(code, jump if true, jump if false, constant)``, which can be looked at and run without installing
anything; :func:`encode` makes the bytes the kernel takes.

Everything of ioctl type 0xAE is handed over, and SEV_ISSUE_CMD by its full number: the other
requests of its type belong to CD-ROM drives.
"""

from __future__ import annotations

import struct
from typing import Final

Instruction = tuple[int, int, int, int]

# linux/bpf_common.h: class, size, mode and operation of the instructions used here.
LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
JUMP_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
RETURN: Final = 0x06  # BPF_RET | BPF_K

# struct seccomp_data; arguments are 64 bits wide, the low half comes first.
NR: Final = 0
ARCH: Final = 4
ARG0: Final = 16
ARG1: Final = 24

AUDIT_ARCH_X86_64: Final = 0xC000003E
RET_ALLOW: Final = 0x7FFF0000
RET_USER_NOTIF: Final = 0x7FC00000

NR_IOCTL: Final = 16
NR_STATFS: Final = 137
NR_FSTATFS: Final = 138
NR_BPF: Final = 321

KVMIO: Final = 0xAE
SEV_ISSUE_CMD: Final = 0xC0105300
BPF_PROG_ATTACH: Final = 8
BPF_PROG_DETACH: Final = 9
BPF_PROG_QUERY: Final = 16


def program(*, cgroup: bool = False) -> list[Instruction]:
    """The filter.

    Args:
        cgroup: also hand over what tells a cgroup2 file system from another one.
    """
    trapped: list[tuple[int, list[Instruction]]] = [(NR_IOCTL, _ioctl())]
    if cgroup:
        trapped += [(NR_BPF, _bpf()), (NR_STATFS, _always()), (NR_FSTATFS, _always())]
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCH),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCH_X86_64),
        (RETURN, 0, 0, RET_ALLOW),
        (LOAD, 0, 0, NR),
    ]
    for number, block in trapped:
        code.append((JUMP_EQUAL, 0, len(block), number))
        code += block
    code.append((RETURN, 0, 0, RET_ALLOW))
    return code


def encode(code: list[Instruction]) -> bytes:
    """An array of ``struct sock_filter``."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _always() -> list[Instruction]:
    return [(RETURN, 0, 0, RET_USER_NOTIF)]


def _ioctl() -> list[Instruction]:
    """By type, or the one full number."""
    return [
        (LOAD, 0, 0, ARG1),
        (JUMP_EQUAL, 3, 0, SEV_ISSUE_CMD),
        (AND, 0, 0, 0xFF00),
        (JUMP_EQUAL, 1, 0, KVMIO << 8),
        (RETURN, 0, 0, RET_ALLOW),
        (RETURN, 0, 0, RET_USER_NOTIF),
    ]


def _bpf() -> list[Instruction]:
    """The commands that take the descriptor of a cgroup."""
    return [
        (LOAD, 0, 0, ARG0),
        (JUMP_EQUAL, 3, 0, BPF_PROG_ATTACH),
        (JUMP_EQUAL, 2, 0, BPF_PROG_DETACH),
        (JUMP_EQUAL, 1, 0, BPF_PROG_QUERY),
        (RETURN, 0, 0, RET_ALLOW),
        (RETURN, 0, 0, RET_USER_NOTIF),
    ]
