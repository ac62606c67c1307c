"""A bus lock was taken, or is about to be: exit, run flag, wait for admission.

Two kinds of hardware (kvm.md A.2, A.4, A.5):

* *trap*: the exit comes after the instruction. The lock has happened; what waits is the re-entry.
* *fault*: the exit comes before. The processor executes the instruction only with credit in a
  counter, which KVM sets to 1 when the vCPU comes back to the same RIP.

Detection is armed for a vCPU when the VMM enabled ``KVM_CAP_X86_BUS_LOCK_EXIT`` before the vCPU's
last power-on (or what each vendor counts as that), or while a finite ``bus_lock.max`` applies to
its process. Only the first makes an exit to user space. Either makes the event *owed*: before the
guest is entered again, the limiter must have admitted it (kvm.md C.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsim.engine.base import BusLock
from kvmsim.kvm import debug

if TYPE_CHECKING:
    from kvmsim.kvm.vcpu import Vcpu


def arm(vcpu: Vcpu) -> None:
    """Set the vCPU's controls from what the VMM enabled for the VM so far."""
    vcpu.bus_lock_exit = vcpu.vm.bus_lock_detection


def taken(vcpu: Vcpu, stop: BusLock, now_ns: int) -> bool:
    """The guest stopped at a bus lock and for no other reason; whether that is an exit."""
    if vcpu.fault_like and intercepts(vcpu):
        return intercept(vcpu)
    perform(vcpu, stop.cpl, now_ns)
    vcpu.rip += stop.insn_len
    vcpu.stop = None
    if vcpu.fault_like:
        return False
    if vcpu.bus_lock_exit:
        vcpu.owed = True
        return True
    vcpu.owed = vcpu.detects and vcpu.vm.accounting.bus_lock_limited(vcpu.pid)
    return False


def ride(vcpu: Vcpu, cpl: int, now_ns: int) -> bool:
    """The instruction of another stop took a bus lock; whether the processor reported it.

    On fault-like hardware the intercept came first, and the lock itself passes unseen.
    """
    perform(vcpu, cpl, now_ns)
    vcpu.lock_done = True
    if vcpu.fault_like:
        return False
    detected = vcpu.bus_lock_exit or (
        vcpu.detects and vcpu.vm.accounting.bus_lock_limited(vcpu.pid)
    )
    if detected:
        vcpu.owed = True
    return detected


def intercepts(vcpu: Vcpu) -> bool:
    """Whether fault-like hardware exits instead of taking the lock; uses up credit if not."""
    if not vcpu.bus_lock_exit and not vcpu.vm.accounting.bus_lock_limited(vcpu.pid):
        return False
    if vcpu.bus_lock_counter:
        vcpu.bus_lock_counter -= 1
        return False
    return True


def intercept(vcpu: Vcpu) -> bool:
    """Fault-like hardware stops before the lock; whether that is an exit to user space.

    The stop stays, for the instruction's next try.
    """
    vcpu.intercepted = True
    vcpu.intercepted_rip = vcpu.rip
    vcpu.remaining_ns = 0
    vcpu.owed = True
    if vcpu.bus_lock_exit:
        vcpu.compare_due = True
        return True
    # Handled in the kernel: nobody could move RIP, so the credit is certain.
    vcpu.bus_lock_counter = 1
    return False


def compare_rip(vcpu: Vcpu) -> None:
    """First KVM_RUN after a fault-like exit: credit if the guest is still at the instruction.

    Linux 6.16 svm.c ``complete_userspace_buslock``. Without credit the instruction is not about to
    be executed, so nothing is owed for it. To KVM the RIP of an encrypted guest is always 0.
    """
    vcpu.compare_due = False
    if vcpu.rip == vcpu.intercepted_rip or vcpu.vm.es_active:
        vcpu.bus_lock_counter = 1
    else:
        vcpu.bus_lock_counter = 0
        vcpu.owed = False


def execute_intercepted(vcpu: Vcpu, now_ns: int) -> None:
    """Back in the guest after an intercept: the instruction executes, unless RIP was moved."""
    vcpu.intercepted = False
    stop = vcpu.stop
    assert stop is not None
    if vcpu.rip != vcpu.intercepted_rip and not vcpu.vm.es_active:
        vcpu.stop = None
        return
    vcpu.bus_lock_counter = 0
    perform(vcpu, stop.cpl, now_ns)
    if type(stop) is BusLock:
        vcpu.rip += stop.insn_len
        vcpu.stop = None
    else:
        vcpu.lock_done = True


def perform(vcpu: Vcpu, cpl: int, now_ns: int) -> None:
    """The lock is on the bus: every other CPU of the machine stalls."""
    vcpu.bus_locks += 1
    if cpl and vcpu.debug is not None:
        debug.bus_lock(vcpu.debug, cpl)
    on_bus_lock = vcpu.vm.on_bus_lock
    if on_bus_lock is not None:
        on_bus_lock(vcpu, now_ns)
