"""What KVM says about the processors of a guest that executes code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.abi import msrs as abi
from kvmsim.engine.base import Rdmsr, Wrmsr
from kvmsim.engine.x86 import msr
from kvmsim.engine.x86.delivery import GP, Fault
from kvmsim.engine.x86.vm import BYTES_PER_NS
from kvmsim.kvm import (
    capabilities,
    clock,
    cpuid,
    cpuid_guest,
    debug,
    fpu,
    lbr,
    msr_filter,
    msr_rules,
    msrs,
    pmu,
    pvclock,
    sregs,
)
from kvmsim.kvm.dispatch import state_of
from kvmsim.kvm.x86 import hypercalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.decode import Instruction
    from kvmsim.kvm.vcpu import Vcpu

#: Registers the guest changes without KVM: by loads of segments, SWAPGS, CR0.
_EMULATORS = frozenset({abi.EFER, abi.FS_BASE, abi.GS_BASE, abi.KERNEL_GS_BASE})
#: Registers the emulator needs a copy of.
SHARED = frozenset(
    {
        *(abi.IA32_SYSENTER_CS, abi.IA32_SYSENTER_ESP, abi.IA32_SYSENTER_EIP),
        *(abi.STAR, abi.LSTAR, abi.CSTAR, abi.SYSCALL_MASK, abi.KERNEL_GS_BASE, abi.TSC_AUX),
        *(abi.IA32_CR_PAT, abi.MTRR_DEF_TYPE, *abi.MTRR_FIXED, *abi.MTRR_VARIABLE),
    }
)


class VcpuPolicy:
    """What KVM says about the processors of a guest.

    Args:
        fault_like: see ``Policy``.

    Attributes:
        vcpus: the vCPU behind each of the engine's.
        clock_ns: the present, in real time; None: it is the time of the entry and the guest time
            since.
    """

    def __init__(self, *, fault_like: bool) -> None:
        self.fault_like = fault_like
        # KVM does not show guests a split-lock #AC control (kvm.md B.5).
        self.split_lock_ac = False
        self.tsc_khz = 3_000_000
        self.owns_msrs = True
        self.vcpus: dict[Cpu, Vcpu] = {}
        self.clock_ns: Callable[[], int] | None = None

    def now_ns(self, cpu: Cpu) -> int:
        """The present, as KVM counts it."""
        if self.clock_ns is not None:
            return self.clock_ns()
        executed_ns = cpu.guest_ns - cpu.stopped_ns + cpu.vm.meter.used() // BYTES_PER_NS
        return self.vcpus[cpu].since_ns + executed_ns

    def cpuid(self, cpu: Cpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """The table user space set, with what changes while the guest runs.

        Raises:
            Fault: #GP, CPUID faulting is on and the guest above ring 0.
        """
        vcpu = self.vcpus[cpu]
        if cpu.registers.cpl and msr_rules.stored(vcpu, abi.MISC_FEATURES_ENABLES) & 1:
            raise Fault(GP)
        return cpuid_guest.read(vcpu, leaf, subleaf)

    def rdpmc(self, cpu: Cpu, index: int) -> int | None:
        """See ``Policy``."""
        return pmu.rdpmc(self.vcpus[cpu], index)

    def xcr0(self, cpu: Cpu) -> int:
        """What the guest's CPUID shows."""
        return cpuid.guest_xcr0(self.vcpus[cpu]) | fpu.XCR0_X87

    def tsc(self, cpu: Cpu) -> int:
        """See ``Policy``."""
        return clock.guest_tsc(self.vcpus[cpu], self.now_ns(cpu))

    def hypercall(self, cpu: Cpu, found: Instruction) -> Stop | None:
        """See ``Policy``."""
        return hypercalls.call(self.vcpus[cpu], cpu, found)

    def dr6_written(self, cpu: Cpu, value: int) -> int:
        """DR6 with the bits that are fixed for this guest."""
        vcpu = self.vcpus[cpu]
        return debug.dr6_written(
            value, bus_lock_detect=debug.has_bus_lock_detect(vcpu), rtm=debug.has_rtm(vcpu)
        )

    # -- model-specific registers ------------------------------------------------------------------

    def rdmsr(self, cpu: Cpu, index: int) -> int | Rdmsr | None:
        """Any register, by the guest's rules and user space's filter."""
        vcpu = self.vcpus[cpu]
        if not msr_filter.allows(vcpu.vm, index, write=False):
            reason = caps.KVM_MSR_EXIT_REASON_FILTER
        elif index in _EMULATORS:
            return msr.held(cpu, index)
        else:
            value = msrs.guest_read(vcpu, index, self.now_ns(cpu))
            cpu.lbr = lbr.entered_again(vcpu)
            if value is not None:
                return value
            reason = _refused(vcpu, index)
        exits = capabilities.of(vcpu.vm).user_space_msr & reason
        return Rdmsr(index=index, reason=reason) if exits else None

    def wrmsr(self, cpu: Cpu, index: int, value: int) -> bool | Wrmsr:
        """Any register, by the guest's rules and user space's filter."""
        vcpu = self.vcpus[cpu]
        if not msr_filter.allows(vcpu.vm, index, write=True):
            reason = caps.KVM_MSR_EXIT_REASON_FILTER
        elif self._write(vcpu, cpu, index, value):
            return True
        else:
            reason = _refused(vcpu, index)
        exits = capabilities.of(vcpu.vm).user_space_msr & reason
        return Wrmsr(index=index, data=value, reason=reason) if exits else False

    def _write(self, vcpu: Vcpu, cpu: Cpu, index: int, value: int) -> bool:
        if index == abi.EFER:
            return sregs.guest_may_have_efer(vcpu, value) and msr.write_efer(cpu, value)
        if index in _EMULATORS:
            if not msr_rules.canonical(value):
                return False
            msr.adopt(cpu, index, value)
            return True
        taken = msrs.guest_write(vcpu, index, value, self.now_ns(cpu))
        cpu.lbr = lbr.entered_again(vcpu)
        share_msrs(vcpu, cpu)
        if pvclock.of(vcpu).seen != clock.of(vcpu.vm).changes:
            pvclock.enter(vcpu, cpu.memory, self.now_ns(cpu))
        return taken


def share_msrs(vcpu: Vcpu, cpu: Cpu) -> None:
    """Give the emulator what was written of the registers it needs."""
    stored = state_of(vcpu, msr_rules.Msrs)
    if stored.changed:
        for index in stored.changed & SHARED:
            msr.adopt(cpu, index, stored.values[index])
        stored.changed.clear()


def _refused(vcpu: Vcpu, index: int) -> int:
    """Why KVM refused a register, as user space hears it."""
    if msrs.known(vcpu, index):
        return caps.KVM_MSR_EXIT_REASON_INVAL
    return caps.KVM_MSR_EXIT_REASON_UNKNOWN
