"""What a guest's processor is like, as far as its engine does not decide that by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu

DR6_FIXED = 0xFFFF_0FF0
DR6_WRITABLE = 0xE00F


class Policy(Protocol):
    """Answers for one VM."""

    fault_like: bool
    """Bus locks stop the guest before they are taken (AMD), not behind (Intel)."""

    split_lock_ac: bool
    """A split lock on write-back memory raises #AC and is not taken (MSR_TEST_CTRL bit 29)."""

    tsc_khz: int
    """Frequency of the time stamp counter, which counts the time a vCPU executes."""

    def cpuid(self, cpu: Cpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""

    def rdmsr(self, cpu: Cpu, index: int) -> int | None:
        """A register the engine does not keep; None: #GP."""

    def wrmsr(self, cpu: Cpu, index: int, value: int) -> bool:
        """Write a register the engine does not keep; False: #GP."""

    def dr6_written(self, cpu: Cpu, value: int) -> int:
        """What DR6 holds after the guest wrote a 32-bit value."""


class PlainPolicy:
    """A processor with nothing special: CPUID is zero, unknown registers are #GP.

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

    def cpuid(self, cpu: Cpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """See :meth:`Policy.cpuid`."""
        del cpu, leaf, subleaf
        return (0, 0, 0, 0)

    def rdmsr(self, cpu: Cpu, index: int) -> int | None:
        """See :meth:`Policy.rdmsr`."""
        del cpu, index
        return None

    def wrmsr(self, cpu: Cpu, index: int, value: int) -> bool:
        """See :meth:`Policy.wrmsr`."""
        del cpu, index, value
        return False

    def dr6_written(self, cpu: Cpu, value: int) -> int:
        """See :meth:`Policy.dr6_written`."""
        del cpu
        return (value & DR6_WRITABLE) | DR6_FIXED
