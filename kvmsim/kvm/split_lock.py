"""A guest took a split lock on a host whose processor raises #AC for them (kvm.md B.5).

KVM intercepts the exception; the lock has not happened. Whose it is, in this order:

* the guest's own alignment check (CPL 3, CR0.AM, EFLAGS.AC): the guest gets the #AC;
* ``split_lock_detect=warn``: the thread sleeps 10 ms, waits for the machine's one semaphore, and
  goes on without detection for two ticks. The lock then happens, and may be a bus lock exit;
* ``fatal``: KVM_EXIT_EXCEPTION, and SIGBUS for the thread.

Linux 6.12 vmx.c ``handle_exception_nmi``, ``handle_guest_split_lock``.
"""

from __future__ import annotations

from struct import pack_into
from typing import TYPE_CHECKING

from kvmsim.abi.exits import Exit
from kvmsim.abi.structs import KVM_REGS
from kvmsim.host.split_lock import Mode
from kvmsim.host.split_locks import MISERY_NS
from kvmsim.kvm import debug, events, sregs
from kvmsim.kvm.dispatch import state_of
from kvmsim.kvm.events import QueuedException

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.base import SplitLockAc
    from kvmsim.kvm.vcpu import Vcpu

AC_VECTOR = 17
SIGBUS = 7
CR0_AM = 1 << 18
RFLAGS_AC = 1 << 18


class SplitLockTreatment:
    """What the kernel has done to a vCPU's thread for split locks.

    Attributes:
        reported: a line was printed for it.
        off_until_ns: its CPU does not detect split locks until then.
    """

    __slots__ = ("off_until_ns", "reported")

    def __init__(self, vcpu: Vcpu) -> None:
        del vcpu
        self.reported = False
        self.off_until_ns = 0


def raised(vcpu: Vcpu, stop: SplitLockAc, now_ns: int) -> int | None:
    """The processor raised #AC for a split lock; an exit reason, if that ends the run."""
    vcpu.stop = None
    host = vcpu.vm.machine.split_lock
    if not host.has_ac or _checks_alignment(vcpu, stop.cpl):
        events.of(vcpu).exception = QueuedException(
            AC_VECTOR, pending=True, has_error_code=True, error_code=0
        )
        debug.of(vcpu).queued = True
        return None
    comm = f"CPU {vcpu.id}/KVM"
    if host.policy.mode is not Mode.WARN:
        host.refuse(comm, vcpu.pid, vcpu.rip)
        if vcpu.on_signal is not None:
            vcpu.on_signal(vcpu, SIGBUS)
        pack_into("<II", vcpu.run.memory, 32, AC_VECTOR, 0)
        return Exit.EXCEPTION
    treatment = state_of(vcpu, SplitLockTreatment)
    if not treatment.reported:
        treatment.reported = True
        host.warn(comm, vcpu.pid, vcpu.rip, now_ns)
    vcpu.asleep_until_ns = now_ns + (MISERY_NS if host.mitigates else 0)
    return None


def _checks_alignment(vcpu: Vcpu, cpl: int) -> bool:
    flags = KVM_REGS.get(vcpu.get_regs(), "rflags")
    return cpl == 3 and bool(sregs.of(vcpu).get("cr0") & CR0_AM) and bool(flags & RFLAGS_AC)


def rest_ns(vcpu: Vcpu, now_ns: int) -> int:
    """For how long the thread sleeps on; 0: the lock may pass, from now until two ticks later."""
    until_ns = vcpu.asleep_until_ns
    assert until_ns is not None
    if until_ns > now_ns:
        return until_ns - now_ns
    host = vcpu.vm.machine.split_lock
    wait_ns = host.let_through(vcpu, now_ns)
    if wait_ns:
        vcpu.asleep_until_ns = now_ns + wait_ns
        return wait_ns
    vcpu.asleep_until_ns = None
    state_of(vcpu, SplitLockTreatment).off_until_ns = now_ns + host.detection_off_ns
    return 0


def interrupted(vcpu: Vcpu) -> None:
    """A signal ends the sleep; the next try of the instruction raises #AC again."""
    vcpu.asleep_until_ns = None
    vcpu.vm.machine.split_lock.leave(vcpu)


def detector(vcpu: Vcpu, now_ns: Callable[[], int]) -> Callable[[], bool] | None:
    """What says whether the processor of a vCPU detects split locks; None: this host's never do.

    Args:
        vcpu: the vCPU.
        now_ns: the present, while it executes.
    """
    if not vcpu.vm.machine.split_lock.raises_ac:
        return None
    treatment = state_of(vcpu, SplitLockTreatment)
    return lambda: now_ns() >= treatment.off_until_ns
