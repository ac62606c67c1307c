"""The local APIC as model-specific registers: IA32_APIC_BASE, IA32_TSC_DEADLINE, the x2APIC's.

Rows for ``kvmsim.kvm.msrs``. Behaviour: Linux 6.12 lapic.c ``kvm_apic_set_base``,
``kvm_set_lapic_tscdeadline_msr``, ``kvm_x2apic_msr_write``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmsim.abi import msrs as abi
from kvmsim.kvm import apic_messages, lapic, sregs
from kvmsim.kvm.apic_timer import DEADLINE
from kvmsim.kvm.msrs import SPECIAL, Special

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu

MODE: Final = lapic.APIC_ENABLE | lapic.X2APIC_ENABLE


def _write_base(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    """User space puts the APIC anywhere, in any mode its CPUID shows."""
    if not sregs.valid_apic_base(vcpu, value):
        return False
    vcpu.apic_base = value
    if vcpu.vm.irqchip:
        lapic.of(vcpu)
        vcpu.kick(now_ns)
    return True


def _guest_write_base(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    """The guest cannot go from x2APIC back to xAPIC, nor into x2APIC at once (SDM 3, 11.12.5)."""
    old, new = vcpu.apic_base & MODE, value & MODE
    if value != vcpu.apic_base and (old, new) in {(MODE, lapic.APIC_ENABLE), (0, MODE)}:
        return False
    return _write_base(vcpu, value, now_ns)


def _read_deadline(vcpu: Vcpu, now_ns: int) -> int:
    """What was written, until it has passed; 0 in other modes of the timer."""
    if not vcpu.vm.irqchip:
        return 0
    apic = lapic.of(vcpu)
    apic.expire(now_ns)
    return apic.timer.deadline if apic.present and apic.timer.mode == DEADLINE else 0


def _write_deadline(vcpu: Vcpu, value: int, now_ns: int) -> bool:
    if vcpu.vm.irqchip:
        lapic.of(vcpu).write_deadline(value, now_ns)
        vcpu.kick(now_ns)
    return True


def _register(number: int) -> Special:
    """One register of the x2APIC; there are none without an APIC in the kernel."""
    register = (number - abi.X2APIC_FIRST) << 4

    def read(vcpu: Vcpu, now_ns: int) -> int | None:
        return apic_messages.read_msr(vcpu, register, now_ns) if vcpu.vm.irqchip else None

    def write(vcpu: Vcpu, value: int, now_ns: int) -> bool:
        return vcpu.vm.irqchip and apic_messages.write_msr(vcpu, register, value, now_ns)

    return Special(read, write)


SPECIAL.update(
    {
        abi.IA32_APICBASE: Special(
            lambda vcpu, now_ns: vcpu.apic_base, _write_base, guest_write=_guest_write_base
        ),
        abi.IA32_TSC_DEADLINE: Special(_read_deadline, _write_deadline),
        **{number: _register(number) for number in range(abi.X2APIC_FIRST, abi.X2APIC_END)},
    }
)
