"""Exits of guests that want something of user space: RDMSR, WRMSR, hypercalls, system events.

The instruction waits for the answer, which the next KVM_RUN gives to the engine as ``input``. Where
user space moved RIP meanwhile, it is abandoned like port I/O. Linux 6.12 x86.c
``kvm_msr_user_space``, ``complete_hypercall_exit``.
"""

from __future__ import annotations

from struct import pack_into, unpack_from
from typing import TYPE_CHECKING

from kvmsim.abi.exits import Exit
from kvmsim.engine.base import Hypercall, Rdmsr, SystemEvent, TprLowered, Wrmsr
from kvmsim.kvm import exits

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu

    Delegated = Rdmsr | Wrmsr | Hypercall


def leave(vcpu: Vcpu, stop: Delegated | SystemEvent | TprLowered) -> int:
    """Show user space what is wanted; the exit reason."""
    memory = vcpu.run.memory
    if isinstance(stop, TprLowered):
        # What it is now is in the page in any case (Linux 6.12 vmx.c handle_cr).
        exits.retire(vcpu, stop)
        return Exit.SET_TPR
    if isinstance(stop, SystemEvent):
        exits.retire(vcpu, stop)
        words = stop.data[:16]
        pack_into(f"<II{len(words)}Q", memory, 32, stop.kind, len(words), *words)
        return Exit.SYSTEM_EVENT
    if isinstance(stop, Hypercall):
        pack_into("<9Q", memory, 32, stop.number, *stop.args, 0, 0, 0, stop.flags)
        reason = Exit.HYPERCALL
    else:
        write = isinstance(stop, Wrmsr)
        data = stop.data if isinstance(stop, Wrmsr) else 0
        # The error byte is user space's to set; it is clear until then.
        pack_into("<B7xIIQ", memory, 32, 0, stop.reason, stop.index, data)
        reason = Exit.X86_WRMSR if write else Exit.X86_RDMSR
    vcpu.pending, vcpu.pending_rip = stop, vcpu.rip
    return reason


def complete(vcpu: Vcpu, stop: Delegated) -> None:
    """Take the answer."""
    memory = vcpu.run.memory
    if isinstance(stop, Hypercall):
        vcpu.input = bytes(memory[88:96])
    else:
        error, data = unpack_from("<B15xQ", memory, 32)
        vcpu.input = bytes([bool(error)]) + data.to_bytes(8, "little")
    exits.retire(vcpu, stop)
