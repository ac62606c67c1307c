import struct

import pytest

from kvmsim.interpose import filter as bpf

TRAPPED, ALLOWED = bpf.RET_USER_NOTIF, bpf.RET_ALLOW
KVM_RUN = 0xAE80
BTRFS_IOCTL = 0x5000_940A


def decide(code, nr, args=(0, 0), arch=bpf.AUDIT_ARCH_X86_64):
    """Run a filter as the kernel would."""
    data = struct.pack("=iIQ6Q", nr, arch, 0x401000, *args, *[0] * (6 - len(args)))
    accumulator, position = 0, 0
    while True:
        operation, if_true, if_false, constant = code[position]
        position += 1
        if operation == bpf.LOAD:
            accumulator = struct.unpack_from("=I", data, constant)[0]
        elif operation == bpf.AND:
            accumulator &= constant
        elif operation == bpf.JUMP_EQUAL:
            position += if_true if accumulator == constant else if_false
        else:
            assert operation == bpf.RETURN
            return constant


@pytest.fixture(params=[False, True], ids=["plain", "cgroup"])
def cgroup(request):
    return request.param


@pytest.mark.parametrize(
    ("request_number", "verdict"),
    [
        (KVM_RUN, TRAPPED),
        (0xAEFF, TRAPPED),
        (0xC008AEBA, TRAPPED),
        (0xFFFF_FFFF_0000_AE00, TRAPPED),
        (bpf.SEV_ISSUE_CMD, TRAPPED),
        (0x5300, ALLOWED),
        (0xC0105301, ALLOWED),
        (0x5401, ALLOWED),
        (0xAE, ALLOWED),
        (BTRFS_IOCTL, ALLOWED),
    ],
)
def test_ioctls_of_kvm_and_one_of_sev_are_trapped(cgroup, request_number, verdict):
    code = bpf.program(cgroup=cgroup)
    assert decide(code, bpf.NR_IOCTL, (3, request_number)) == verdict


def test_other_system_calls_go_on(cgroup):
    code = bpf.program(cgroup=cgroup)
    for nr in (0, 1, 3, 15, 17, 59, 202, 435):
        assert decide(code, nr, (bpf.BPF_PROG_ATTACH, KVM_RUN)) == ALLOWED


@pytest.mark.parametrize(
    ("nr", "first", "trapped"),
    [
        (bpf.NR_STATFS, 0, True),
        (bpf.NR_FSTATFS, 0, True),
        (bpf.NR_BPF, bpf.BPF_PROG_ATTACH, True),
        (bpf.NR_BPF, bpf.BPF_PROG_DETACH, True),
        (bpf.NR_BPF, bpf.BPF_PROG_QUERY, True),
        (bpf.NR_BPF, 5, False),
    ],
)
def test_calls_that_ask_about_cgroups_are_trapped_only_with_a_tree(nr, first, trapped):
    assert decide(bpf.program(), nr, (first, 0)) == ALLOWED
    with_tree = decide(bpf.program(cgroup=True), nr, (first, 0))
    assert with_tree == (TRAPPED if trapped else ALLOWED)


def test_calls_of_another_architecture_go_on(cgroup):
    i386 = 0x40000003
    for nr in (bpf.NR_IOCTL, 54):
        assert decide(bpf.program(cgroup=cgroup), nr, (3, KVM_RUN), i386) == ALLOWED


def test_encoding_is_eight_bytes_an_instruction_and_jumps_stay_inside(cgroup):
    code = bpf.program(cgroup=cgroup)
    encoded = bpf.encode(code)
    assert len(encoded) == 8 * len(code)
    assert encoded[:8] == struct.pack("=HBBI", 0x20, 0, 0, 4)
    for position, (operation, if_true, if_false, _) in enumerate(code):
        if operation == bpf.JUMP_EQUAL:
            assert position + 1 + max(if_true, if_false) < len(code)
