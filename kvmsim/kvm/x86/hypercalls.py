"""VMCALL and VMMCALL: KVM's hypercalls, and VMGEXIT of an SEV-ES guest.

Linux 6.12 x86.c ``kvm_emulate_hypercall``, ``emulator_fix_hypercall``; svm/sev.c
``sev_handle_vmgexit_msr_protocol``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.abi import caps
from kvmsim.engine.base import Hypercall
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86.delivery import UD, Fault
from kvmsim.kvm import (
    apic_messages,
    capabilities,
    ghcb_msr,
    interrupts,
    lapic,
    msr_guest,
    protected,
)
from kvmsim.kvm.lapic import Message

if TYPE_CHECKING:
    from kvmsim.engine.base import Stop
    from kvmsim.engine.x86.cpu import Cpu
    from kvmsim.engine.x86.decode import Instruction
    from kvmsim.kvm.vcpu import Vcpu

VMCALL, VMMCALL = 0xC1, 0xD9
KVM_ENOSYS, KVM_EPERM, KVM_EOPNOTSUPP, KVM_EINVAL = -1000, -1, -95, -22

VAPIC_POLL_IRQ, KICK_CPU, CLOCK_PAIRING, SEND_IPI, SCHED_YIELD, MAP_GPA_RANGE = (
    *(1, 5, 9, 10, 11, 12),
)
#: Hypercall -> bit of the feature that announces it.
_FEATURES = {KICK_CPU: 7, SEND_IPI: 11, SCHED_YIELD: 13, MAP_GPA_RANGE: 16}
LONG_MODE = 1
MAP_GPA_RANGE_RESERVED = ~0x1F


def call(vcpu: Vcpu, cpu: Cpu, found: Instruction) -> Stop | None:
    """Carry out the instruction; see ``Policy.hypercall``.

    Raises:
        Fault: #UD, the other vendor's instruction and KVM does not put that right.
    """
    if found.repeat == 0xF3 and found.modrm == VMMCALL and protected.has_vmsa(vcpu):
        return ghcb_msr.vmgexit(vcpu)
    native = VMCALL if vcpu.vm.machine.preset.vendor == "intel" else VMMCALL
    if found.modrm != native:
        if capabilities.of(vcpu.vm).disabled_quirks & caps.KVM_X86_QUIRK_FIX_HYPERCALL_INSN:
            raise Fault(UD)
        at = cpu.registers.linear_rip + found.length - 3
        cpu.linear.write(at, bytes([0x0F, 0x01, native]), user=cpu.registers.cpl == 3)
    wide = cpu.registers.mode == 64
    mask = r.U64 if wide else r.U32
    number, *words = (cpu.registers.q[n] & mask for n in (r.RAX, r.RBX, r.RCX, r.RDX, r.RSI))
    args = (words[0], words[1], words[2], words[3])
    if cpu.registers.cpl:
        result: int | Hypercall = KVM_EPERM
    else:
        result = _carry_out(vcpu, number, args, LONG_MODE if wide else 0)
    if isinstance(result, Hypercall):
        return result
    cpu.registers.q[r.RAX] = result & mask
    return None


def _carry_out(
    vcpu: Vcpu, number: int, args: tuple[int, int, int, int], flags: int
) -> int | Hypercall:
    feature = _FEATURES.get(number)
    if feature is not None and not msr_guest.pv_has(vcpu, feature):
        return KVM_ENOSYS
    if number in {VAPIC_POLL_IRQ, SCHED_YIELD}:
        return 0
    if number == KICK_CPU:
        return _kick(vcpu, args[1])
    if number == SEND_IPI:
        return _send_ipi(vcpu, args, 64 if flags & LONG_MODE else 32)
    if number == MAP_GPA_RANGE and capabilities.of(vcpu.vm).hypercall_exits >> number & 1:
        return _map_gpa_range(args, flags)
    # The host's clock is not the time-stamp counter's.
    return KVM_EOPNOTSUPP if number == CLOCK_PAIRING else KVM_ENOSYS


def _map_gpa_range(args: tuple[int, int, int, int], flags: int) -> int | Hypercall:
    """Pages become private or shared: user space's business."""
    gpa, pages, attributes, _ = args
    last = (gpa + pages * 4096) & r.U64
    if gpa % 4096 or not pages or last <= gpa or attributes & MAP_GPA_RANGE_RESERVED:
        return KVM_EINVAL
    return Hypercall(number=MAP_GPA_RANGE, args=(gpa, pages, attributes, 0), flags=flags)


def _kick(vcpu: Vcpu, apic_id: int) -> int:
    """End the halt of another vCPU (a spinlock's owner wakes who waits), interrupts on or off."""
    if vcpu.vm.irqchip:
        message = Message(0, mode=lapic.REMOTE_READ, destination=apic_id & r.U32)
        apic_messages.deliver(vcpu.vm, message, vcpu.since_ns, lapic.of(vcpu))
    return 0


def _send_ipi(vcpu: Vcpu, args: tuple[int, int, int, int], width: int) -> int:
    """An interrupt to up to 128 vCPUs: two bitmaps from an APIC id on; how many took it."""
    low, high, first, command = args
    if command & (1 << 11 | 3 << 18) or not vcpu.vm.irqchip:
        return KVM_EINVAL
    message = Message(
        command & 0xFF,
        mode=command & lapic.MODE_MASK,
        level=bool(command & 1 << 15),
        asserted=bool(command & 1 << 14),
    )
    taken = 0
    for number in range(2 * width):
        target = vcpu.vm.vcpus.get(first + number)
        if (low | high << width) >> number & 1 and target is not None:
            taken += lapic.of(target).accept(message, vcpu.since_ns)
    interrupts.offer(vcpu, vcpu.since_ns)
    return taken
