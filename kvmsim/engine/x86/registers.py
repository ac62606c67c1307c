"""The registers of one vCPU, as a view on the emulator's state or on a saved copy of it.

Offsets belong to the release ``backend`` insists on. Lazily computed flags are settled by the
engine after every run; between runs :attr:`Registers.flags` is what the guest would see.
"""

from __future__ import annotations

from dataclasses import dataclass

ENV_BYTES = 5608
U64 = (1 << 64) - 1
U32 = (1 << 32) - 1

# General registers by number.
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
# Segment registers by number; LDTR, TR, GDTR and IDTR follow in the same layout.
ES, CS, SS, DS, FS, GS, LDTR, TR, GDTR, IDTR = range(10)

FLAG_CF, FLAG_TF, FLAG_IF, FLAG_DF = 1, 1 << 8, 1 << 9, 1 << 10
FLAG_NT, FLAG_RF, FLAG_VM, FLAG_AC = 1 << 14, 1 << 16, 1 << 17, 1 << 18
FLAG_IOPL_SHIFT = 12
CR0_AM = 1 << 18
_STATUS_FLAGS = STATUS_FLAGS = 0x8D5  # CF PF AF ZF SF OF
_FLAGS_VALID = 0x3F_7FD7

# Offsets in bytes.
_RIP, _EFLAGS, _CC_SRC, _CC_OP, _DF, _HFLAGS = 128, 136, 152, 168, 172, 176
#: Where the privilege level is, in the lowest two bits.
HFLAGS = _HFLAGS
#: Where DR7 is, and the bits of it that enable breakpoints.
DR7, DR7_ENABLED = 5456, 0xFF
#: Where RIP is, and RFLAGS but for the status flags.
RIP, EFLAGS, CC_SRC, CC_OP = _RIP, _EFLAGS, _CC_SRC, _CC_OP
SEGMENTS = 184
_SEGMENT_BYTES = 24
_CS_BASE = SEGMENTS + _SEGMENT_BYTES * CS + 8
_CR, _EFER, _XMM = 424, 592, 824
_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP = 4800, 4808, 4816
_STAR, _LSTAR, _CSTAR, _FMASK, _KERNEL_GS = 4824, 4840, 4848, 4856, 4864
_TSC_AUX, _PAT, _ERROR_CODE, _DR = 4896, 5280, 5384, 5400

# Access rights, as in the upper half of a descriptor.
RIGHTS_S, RIGHTS_P, RIGHTS_L, RIGHTS_DB, RIGHTS_G = 1 << 12, 1 << 15, 1 << 21, 1 << 22, 1 << 23
_RIGHTS = 0x00F0_FF00

_HF_INHIBIT, _HF_CS64, _HF_COPIED = 1 << 3, 1 << 15, ~0x0042_FFF3
_CC_OP_EFLAGS = 1


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register with its hidden part.

    Attributes:
        selector: what the guest loaded.
        base: linear base.
        limit: last valid offset, expanded to bytes.
        rights: bits 8 to 23 of the descriptor's upper half: type, S, DPL, P, AVL, L, D/B, G.
    """

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    rights: int = 0

    @property
    def dpl(self) -> int:
        """Privilege level."""
        return self.rights >> 13 & 3


class Registers:
    """Reads and writes registers in place.

    Args:
        env: ``ENV_BYTES`` of CPU state.

    Attributes:
        debug_writes: how often debug registers were set.
    """

    __slots__ = ("d", "debug_writes", "env", "q")

    def __init__(self, env: memoryview) -> None:
        self.debug_writes = 0
        self.look_at(env)

    def look_at(self, env: memoryview) -> None:
        """Be a view on another state."""
        self.env = env
        self.q = env.cast("Q")
        self.d = env.cast("I")

    # -- plain registers ---------------------------------------------------------------------

    @property
    def rip(self) -> int:
        """Instruction pointer, an offset in CS."""
        return self.q[_RIP // 8]

    @rip.setter
    def rip(self, value: int) -> None:
        self.q[_RIP // 8] = value & U64

    @property
    def flags(self) -> int:
        """RFLAGS, once settled."""
        df = FLAG_DF if self.d[_DF // 4] == U32 else 0
        status = self.q[_CC_SRC // 8] & _STATUS_FLAGS
        return (self.q[_EFLAGS // 8] & _FLAGS_VALID & ~(_STATUS_FLAGS | FLAG_DF)) | status | df | 2

    @flags.setter
    def flags(self, value: int) -> None:
        self.q[_CC_SRC // 8] = value & _STATUS_FLAGS
        self.d[_CC_OP // 4] = _CC_OP_EFLAGS
        self.d[_DF // 4] = U32 if value & FLAG_DF else 1
        # The emulator begins every run with the status flags and DF it finds here, and overwrites
        # the others (QEMU's target/i386/cpu.c, x86_cpu_exec_enter).
        self.q[_EFLAGS // 8] = (value & _FLAGS_VALID) | 2
        self._update_hidden_flags()

    def settle_flags(self, value: int) -> None:
        """Note flags the emulator computed; its hidden flags are right already."""
        self.q[_CC_SRC // 8] = value & _STATUS_FLAGS
        self.d[_CC_OP // 4] = _CC_OP_EFLAGS

    @property
    def cr0(self) -> int:
        """CR0."""
        return self.q[_CR // 8]

    @cr0.setter
    def cr0(self, value: int) -> None:
        self.q[_CR // 8] = value
        self._update_hidden_flags()

    @property
    def cr2(self) -> int:
        """CR2."""
        return self.q[_CR // 8 + 2]

    @cr2.setter
    def cr2(self, value: int) -> None:
        self.q[_CR // 8 + 2] = value

    @property
    def cr3(self) -> int:
        """CR3."""
        return self.q[_CR // 8 + 3]

    @cr3.setter
    def cr3(self, value: int) -> None:
        self.q[_CR // 8 + 3] = value

    @property
    def cr4(self) -> int:
        """CR4."""
        return self.q[_CR // 8 + 4]

    @cr4.setter
    def cr4(self, value: int) -> None:
        self.q[_CR // 8 + 4] = value
        self._update_hidden_flags()

    @property
    def efer(self) -> int:
        """EFER."""
        return self.q[_EFER // 8]

    @efer.setter
    def efer(self, value: int) -> None:
        self.q[_EFER // 8] = value
        self._update_hidden_flags()

    def debug(self, number: int) -> int:
        """DR0 to DR7."""
        return self.q[_DR // 8 + number]

    def set_debug(self, number: int, value: int) -> None:
        """Set DR0 to DR7. Breakpoints are not armed by it."""
        self.q[_DR // 8 + number] = value
        self.debug_writes += 1

    def xmm(self, number: int) -> bytes:
        """XMM register, 16 bytes."""
        return bytes(self.env[_XMM + 64 * number : _XMM + 64 * number + 16])

    def set_xmm(self, number: int, value: bytes) -> None:
        """Set an XMM register."""
        self.env[_XMM + 64 * number : _XMM + 64 * number + 16] = value

    @property
    def error_code(self) -> int:
        """Error code of the exception that stopped the emulator."""
        return self.d[_ERROR_CODE // 4]

    # -- segments ----------------------------------------------------------------------------

    def segment(self, number: int) -> Segment:
        """A segment or table register."""
        return Segment(*self.descriptor(number))

    def descriptor(self, number: int) -> tuple[int, int, int, int]:
        """The same as plain numbers: selector, base, limit, access rights."""
        d, at = self.d, (SEGMENTS + _SEGMENT_BYTES * number) // 4
        return d[at] & 0xFFFF, self.q[at // 2 + 1], d[at + 4], d[at + 5] & _RIGHTS

    def set_segment(self, number: int, value: Segment) -> None:
        """Set a segment or table register, hidden part and all."""
        at = SEGMENTS + _SEGMENT_BYTES * number
        self.d[at // 4] = value.selector
        self.q[(at + 8) // 8] = value.base
        self.d[(at + 16) // 4] = value.limit & U32
        self.d[(at + 20) // 4] = value.rights & _RIGHTS
        if number <= DS:
            self._update_hidden_flags()

    @property
    def cpl(self) -> int:
        """Current privilege level."""
        return self.d[_HFLAGS // 4] & 3

    @property
    def long_mode(self) -> bool:
        """Whether IA-32e mode is active, in 64-bit or compatibility mode."""
        return bool(self.efer & 1 << 10)

    @property
    def mode(self) -> int:
        """Bits of the code segment: 16, 32 or 64."""
        hidden = self.d[_HFLAGS // 4]
        if hidden & _HF_CS64:
            return 64
        return 32 if hidden & 1 << 4 else 16

    @property
    def protected(self) -> bool:
        """Whether in protected mode, virtual-8086 mode excluded."""
        return bool(self.cr0 & 1) and not self.q[_EFLAGS // 8] & FLAG_VM

    @property
    def checks_alignment(self) -> bool:
        """Whether accesses that are not aligned raise #AC."""
        flags = self.q[_EFLAGS // 8]
        return bool(flags & FLAG_AC and self.cr0 & CR0_AM and self.cpl == 3)

    @property
    def linear_rip(self) -> int:
        """Linear address of the next instruction."""
        if self.d[_HFLAGS // 4] & _HF_CS64:
            return self.q[_RIP // 8]
        return (self.q[_RIP // 8] + self.q[_CS_BASE // 8]) & U32

    def advance(self, length: int) -> None:
        """RIP moves past an instruction; the interrupt shadow and the resume flag end."""
        q, d = self.q, self.d
        q[_RIP // 8] = (q[_RIP // 8] + length) & (U64 if d[_HFLAGS // 4] & _HF_CS64 else U32)
        q[_EFLAGS // 8] &= ~FLAG_RF
        d[_HFLAGS // 4] &= ~_HF_INHIBIT

    def resumed(self) -> None:
        """The resume flag has done its duty."""
        self.q[_EFLAGS // 8] &= ~FLAG_RF

    @property
    def shadow(self) -> bool:
        """Whether STI or MOV SS holds interrupts off for one instruction."""
        return bool(self.d[_HFLAGS // 4] & _HF_INHIBIT)

    @shadow.setter
    def shadow(self, value: bool) -> None:
        hidden = self.d[_HFLAGS // 4] & ~_HF_INHIBIT
        self.d[_HFLAGS // 4] = hidden | (_HF_INHIBIT if value else 0)

    def _update_hidden_flags(self) -> None:
        """What the emulator derives from control registers, flags and segments (hflags)."""
        cr0, eflags, efer = self.cr0, self.q[_EFLAGS // 8], self.efer
        cs_rights = self.d[(SEGMENTS + _SEGMENT_BYTES * CS + 20) // 4]
        ss_rights = self.d[(SEGMENTS + _SEGMENT_BYTES * SS + 20) // 4]
        hidden = self.d[_HFLAGS // 4] & _HF_COPIED & U32
        hidden |= ss_rights >> 13 & 3
        hidden |= (cr0 & 1) << 7 | (cr0 >> 1 & 7) << 9
        # TF, VM and IOPL of RFLAGS are looked at besides, and instructions change them there only.
        hidden |= (self.cr4 >> 9 & 1) << 22 | (efer >> 10 & 1) << 14
        if efer & 1 << 10 and cs_rights & RIGHTS_L:
            hidden |= 1 << 4 | 1 << 5 | 1 << 15
        else:
            hidden |= (cs_rights >> 22 & 1) << 4 | (ss_rights >> 22 & 1) << 5
            flat = cr0 & 1 and not eflags & FLAG_VM and cs_rights & RIGHTS_DB
            bases = (self.q[(SEGMENTS + _SEGMENT_BYTES * n + 8) // 8] for n in (DS, ES, SS))
            hidden |= (not flat or any(bases)) << 6
        self.d[_HFLAGS // 4] = hidden

    # -- model-specific registers the emulator keeps -----------------------------------------

    def msr(self, index: int) -> int | None:
        """A register that is part of the emulator's state; None: it is not."""
        at = _MSRS.get(index)
        if at is not None:
            return self.q[at // 8]
        if index in _MSR_BASES:
            return self.segment(_MSR_BASES[index]).base
        return self.d[_NARROW_MSRS[index] // 4] if index in _NARROW_MSRS else None

    def set_msr(self, index: int, value: int) -> bool:
        """Set one; False: it is not part of the emulator's state."""
        at = _MSRS.get(index)
        if at is not None:
            self.q[at // 8] = value
            if index == 0xC0000080:
                self._update_hidden_flags()
            return True
        if index in _MSR_BASES:
            self.q[(SEGMENTS + _SEGMENT_BYTES * _MSR_BASES[index] + 8) // 8] = value
            return True
        if index in _NARROW_MSRS:
            self.d[_NARROW_MSRS[index] // 4] = value & U32
            return True
        return False


_MSRS = {
    0x175: _SYSENTER_ESP,
    0x176: _SYSENTER_EIP,
    0x277: _PAT,
    0xC0000080: _EFER,
    0xC0000081: _STAR,
    0xC0000082: _LSTAR,
    0xC0000083: _CSTAR,
    0xC0000084: _FMASK,
    0xC0000102: _KERNEL_GS,
    0xC0000103: _TSC_AUX,
}
_NARROW_MSRS = {0x174: _SYSENTER_CS}
_MSR_BASES = {0xC0000100: FS, 0xC0000101: GS}
