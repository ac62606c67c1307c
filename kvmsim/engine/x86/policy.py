"""What a guest's processor is like, as far as its engine does not decide that by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvmsim.engine.x86 import registers as r

if TYPE_CHECKING:
    from kvmsim.engine.base import Rdmsr, Stop, Wrmsr
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.decode import Instruction

DR6_FIXED = 0xFFFF_0FF0
DR6_WRITABLE = 0xE00F
KVM_ENOSYS = -1000
KVM_EPERM = -1
XCR0_KNOWN = 0x7


class Policy(Protocol):
    """Answers for one VM."""

    fault_like: bool
    """Bus locks stop the guest before they are taken (AMD), not behind (Intel)."""

    split_lock_ac: bool
    """A split lock on write-back memory raises #AC and is not taken (MSR_TEST_CTRL bit 29)."""

    tsc_khz: int
    """Frequency of the time stamp counter, which counts the time a vCPU executes."""

    owns_msrs: bool
    """Every model-specific register is the policy's; the engine asks for all and checks none.

    What the emulator needs of them is given to it by ``msr.adopt``."""

    def cpuid(self, cpu: Cpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""

    def rdmsr(self, cpu: Cpu, index: int) -> int | Rdmsr | None:
        """A register the engine does not keep; None: #GP; a stop: user space answers."""

    def wrmsr(self, cpu: Cpu, index: int, value: int) -> bool | Wrmsr:
        """Write a register the engine does not keep; False: #GP; a stop: user space answers."""

    def rdpmc(self, cpu: Cpu, index: int) -> int | None:
        """A performance counter, as RDPMC counts them; None: #GP."""

    def xcr0(self, cpu: Cpu) -> int:
        """State components the guest may enable, of x87, SSE and AVX."""

    def tsc(self, cpu: Cpu) -> int:
        """The time stamp counter."""

    def hypercall(self, cpu: Cpu, found: Instruction) -> Stop | None:
        """VMCALL or VMMCALL; RIP moves past it unless there is a stop.

        Raises:
            Fault: the guest gets an exception, and RIP stays.
        """

    def dr6_written(self, cpu: Cpu, value: int) -> int:
        """What DR6 holds after the guest wrote a 32-bit value."""


class PlainPolicy:
    """A processor with nothing special: CPUID is zero, unknown registers are #GP.

    It counts guest time only and knows no hypercall.

    Args:
        fault_like: see :class:`Policy`.
        split_lock_ac: see :class:`Policy`.
        tsc_khz: see :class:`Policy`.
    """

    def __init__(
        self, *, fault_like: bool = False, split_lock_ac: bool = False, tsc_khz: int = 3_000_000
    ) -> None:
        self.fault_like = fault_like
        self.split_lock_ac = split_lock_ac
        self.tsc_khz = tsc_khz
        self.owns_msrs = False

    def cpuid(self, cpu: Cpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """See :meth:`Policy.cpuid`."""
        del cpu, leaf, subleaf
        return (0, 0, 0, 0)

    def rdmsr(self, cpu: Cpu, index: int) -> int | Rdmsr | None:
        """See :meth:`Policy.rdmsr`."""
        del cpu, index
        return None

    def wrmsr(self, cpu: Cpu, index: int, value: int) -> bool | Wrmsr:
        """See :meth:`Policy.wrmsr`."""
        del cpu, index, value
        return False

    def rdpmc(self, cpu: Cpu, index: int) -> int | None:
        """See :meth:`Policy.rdpmc`."""
        del cpu, index
        return None

    def xcr0(self, cpu: Cpu) -> int:
        """See :meth:`Policy.xcr0`."""
        del cpu
        return XCR0_KNOWN

    def tsc(self, cpu: Cpu) -> int:
        """See :meth:`Policy.tsc`."""
        return cpu.tsc

    def hypercall(self, cpu: Cpu, found: Instruction) -> Stop | None:
        """See :meth:`Policy.hypercall`."""
        del found
        value = KVM_EPERM if cpu.registers.cpl else KVM_ENOSYS
        cpu.registers.q[r.RAX] = value & (r.U64 if cpu.registers.mode == 64 else r.U32)
        return None

    def dr6_written(self, cpu: Cpu, value: int) -> int:
        """See :meth:`Policy.dr6_written`."""
        del cpu
        return (value & DR6_WRITABLE) | DR6_FIXED
