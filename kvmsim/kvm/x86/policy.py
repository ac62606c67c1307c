"""What KVM says about the processors of a guest that executes code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.abi.structs import MSR_IA32_DEBUGCTL
from kvmsim.kvm import cpuid, debug

if TYPE_CHECKING:
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.kvm.vcpu import Vcpu


class VcpuPolicy:
    """What KVM says about the processors of a guest.

    Args:
        fault_like: see ``Policy``.

    Attributes:
        vcpus: the vCPU behind each of the engine's.
    """

    def __init__(self, *, fault_like: bool) -> None:
        self.fault_like = fault_like
        # KVM does not show guests a split-lock #AC control (kvm.md B.5).
        self.split_lock_ac = False
        self.tsc_khz = 3_000_000
        self.vcpus: dict[Cpu, Vcpu] = {}

    def cpuid(self, cpu: Cpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """The table user space set; a leaf that is not in it is zero."""
        vcpu = self.vcpus[cpu]
        eax, ebx, ecx, edx = (
            cpuid.guest_register(vcpu, leaf, name, subleaf) for name in ("eax", "ebx", "ecx", "edx")
        )
        return eax, ebx, ecx, edx

    def rdmsr(self, cpu: Cpu, index: int) -> int | None:
        """IA32_DEBUGCTL; #GP for others."""
        if index == MSR_IA32_DEBUGCTL:
            return debug.of(self.vcpus[cpu]).debugctl
        return None

    def wrmsr(self, cpu: Cpu, index: int, value: int) -> bool:
        """IA32_DEBUGCTL by its rules; #GP for others."""
        if index != MSR_IA32_DEBUGCTL:
            return False
        return debug.write_debugctl(self.vcpus[cpu], value, host_initiated=False)

    def dr6_written(self, cpu: Cpu, value: int) -> int:
        """DR6 with the bits that are fixed for this guest."""
        vcpu = self.vcpus[cpu]
        return debug.dr6_written(
            value, bus_lock_detect=debug.has_bus_lock_detect(vcpu), rtm=debug.has_rtm(vcpu)
        )
