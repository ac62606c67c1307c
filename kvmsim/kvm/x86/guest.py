"""Giving the vCPUs of a VM an engine that executes code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.x86.guest import X86Guest
from kvmsim.engine.x86.vm import X86Vm
from kvmsim.kvm.x86.policy import VcpuPolicy
from kvmsim.kvm.x86.registers import VcpuRegisters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmsim.engine.x86.memory import Slot
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm


def attach(vm: Vm, vcpus: Iterable[Vcpu], slots: list[Slot]) -> X86Vm:
    """Let the vCPUs of a VM execute real code.

    Args:
        vm: the VM.
        vcpus: its vCPUs.
        slots: its memory.

    Raises:
        ConfigError: the engine is not installed.
    """
    policy = VcpuPolicy(fault_like=vm.machine.bus_lock_exit == "fault")
    engine = X86Vm(slots, policy)
    for vcpu in vcpus:
        cpu = engine.add_cpu()
        policy.vcpus[cpu] = vcpu
        vcpu.engine = X86Guest(cpu, VcpuRegisters(vcpu))
    return engine
