"""Last-branch records of a guest: who has them, and whose the hardware is (kvm.md E.3, E.4).

KVM has no registers of its own for them. The first access makes a host perf event that asks for the
hardware on behalf of the vCPU's thread; while that event is active, the guest reads and writes the
processor's registers without an exit::

    state   meaning               a guest reads     and writes
    NONE    no event              makes the event, then as in ACTIVE or LOST
    ACTIVE  the event is active   the records       the records
    LOST    another user of the   0                 nothing
            host has the hardware

An event that has lost the hardware never gets it back: it has to go, and another to be made. It
goes when the thread was scheduled out while the guest did not use its records. Linux 6.12
``arch/x86/kvm/vmx/pmu_intel.c``; the rules of the series that brought this are quirks.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from kvmsim.engine.x86.lbr import LBR_SELECT, LBR_TOS, LastBranches
from kvmsim.host.lbr import hardware_of
from kvmsim.kvm import cpuid, debug, pmu
from kvmsim.kvm.dispatch import state_of

if TYPE_CHECKING:
    from kvmsim.host.lbr import LbrHardware
    from kvmsim.kvm.vcpu import Vcpu

DEBUGCTL_LBR = 1 << 0
DEBUGCTL_FREEZE_LBRS_ON_PMI = 1 << 11
#: Bases of FROM, TO and INFO on any processor, the most there are of each.
_REGISTERS = frozenset(
    {LBR_SELECT, LBR_TOS}
    | {base + at for base in (0x40, 0x60) for at in range(8)}
    | {base + at for base in (0x680, 0x6C0, 0xDC0) for at in range(32)}
)


class State(Enum):
    """Whose the hardware is."""

    NONE = "N"
    ACTIVE = "A"
    LOST = "L"


class GuestLbr:
    """The records of one vCPU.

    Attributes:
        records: what was recorded; the guest's as long as its event is active.
        in_use: the guest accessed a register and KVM saw it, since the last time out.
        passed_through: the guest accesses the registers without KVM seeing it.
    """

    __slots__ = (
        *("_facility", "_made_at", "_vcpu_id", "_warned", "in_use", "passed_through", "records"),
    )

    def __init__(self, vcpu: Vcpu) -> None:
        machine = vcpu.vm.machine
        hardware = machine.lbr or hardware_of(machine.preset)
        self.records = _records(hardware)
        self._facility = machine.lbr_facility
        self._vcpu_id = vcpu.id
        self._made_at: int | None = None
        self.release()
        debug.of(vcpu).lbr = self

    @property
    def state(self) -> State:
        """See the module."""
        if self._made_at is None:
            return State.NONE
        return State.ACTIVE if self._made_at == self._facility.takeovers else State.LOST

    def make(self) -> None:
        """Make the event; nothing, if there is one. It is lost already if somebody is there."""
        if self._made_at is None:
            self._made_at = -1 if self._facility.taken else self._facility.takeovers
            self.in_use = True

    def release(self) -> None:
        """The event goes, and what was recorded with it."""
        self._made_at = None
        self._warned = False
        self.in_use = False
        self.passed_through = False
        self.records.reset()
        self.records.enabled = False

    reset = release

    def touch(self) -> bool:
        """An access that KVM sees; whether it reaches the hardware."""
        self.make()
        active = self.state is State.ACTIVE
        if not active:
            self.in_use = False
        elif not self.passed_through:
            self.in_use = True
        return active

    def enter(self, debugctl: int) -> None:
        """The vCPU enters the guest."""
        state, on = self.state, bool(debugctl & DEBUGCTL_LBR)
        self.passed_through = state is State.ACTIVE
        self.records.enabled = self.passed_through and on
        if state is State.ACTIVE:
            self._warned = False
            return
        if state is State.LOST:
            self.in_use = False
        elif not (on or self.in_use):
            return
        if not self._warned:
            self._warned = True
            self._facility.log.print(f"kvm_intel: vcpu-{self._vcpu_id}: fail to passthrough LBR.")

    def scheduled_out(self, debugctl: int, *, ignores_use: bool) -> None:
        """The vCPU's thread left its CPU and came back.

        Args:
            debugctl: the guest's.
            ignores_use: see the quirk ``lbr_release_ignores_use``.
        """
        if self._made_at is None:
            return
        if not debugctl & DEBUGCTL_LBR and (ignores_use or not self.in_use):
            self.release()
        self.in_use = False


def _records(hardware: LbrHardware | None) -> LastBranches:
    if hardware is None:
        return LastBranches()
    return LastBranches(
        hardware.depth,
        from_base=hardware.from_base,
        to_base=hardware.to_base,
        info_base=hardware.info_base,
    )


# -- who has them --------------------------------------------------------------------------------


def available(vcpu: Vcpu) -> LbrHardware | None:
    """The records a guest has by its CPUID and 0x345; None: it has none.

    The model has to be the host's; family and stepping are not compared (6.12).
    """
    machine = vcpu.vm.machine
    if not pmu.supported_capabilities(machine) & pmu.LBR_FORMAT:
        return None
    least = 2 if machine.quirks.lbr_first_series else 1
    if pmu.version(vcpu) < least or not pmu.effective_capabilities(vcpu) & pmu.LBR_FORMAT:
        return None
    return machine.lbr if cpuid.guest_model(vcpu) == machine.preset.model else None


def of(vcpu: Vcpu) -> GuestLbr:
    """The records of a vCPU."""
    return state_of(vcpu, GuestLbr)


def recording(vcpu: Vcpu) -> LastBranches | None:
    """Where the branches of a vCPU in the guest go; None: nowhere."""
    pending = vcpu.debug
    if pending is None or pending.lbr is None or not pending.lbr.records.enabled:
        return None
    return pending.lbr.records


def entered_again(vcpu: Vcpu) -> LastBranches | None:
    """The guest goes on behind an access that KVM saw; like :func:`recording`."""
    pending = vcpu.debug
    if pending is not None and pending.lbr is not None:
        pending.lbr.enter(pending.debugctl)
    return recording(vcpu)


# -- registers, alike for the guest and for user space -------------------------------------------


def owns(index: int) -> bool:
    """Whether a register belongs to some processor's records."""
    return index in _REGISTERS


def has(vcpu: Vcpu, index: int) -> bool:
    """Whether a register is one of this guest's records."""
    return _with_register(vcpu, index) is not None


def read(vcpu: Vcpu, index: int) -> int | None:
    """Read a register; None: the guest has no such one."""
    lbr = _with_register(vcpu, index)
    if lbr is None:
        return None
    return lbr.records.read(index) if lbr.touch() else 0


def write(vcpu: Vcpu, index: int, value: int) -> bool:
    """Write a register; False: the guest has no such one, or it does not take the value."""
    lbr = _with_register(vcpu, index)
    if lbr is None:
        return False
    return lbr.records.write(index, value) if lbr.touch() else True


def _with_register(vcpu: Vcpu, index: int) -> GuestLbr | None:
    if available(vcpu) is None:
        return None
    lbr = of(vcpu)
    return None if lbr.records.read(index) is None else lbr


def switched_on(vcpu: Vcpu) -> None:
    """DEBUGCTL.LBR was written as 1 by a guest that has records: the event is made."""
    of(vcpu).make()


# -- events of the vCPU ----------------------------------------------------------------------------


def scheduled_out(vcpu: Vcpu) -> None:
    """The vCPU's thread slept or was preempted within KVM_RUN."""
    pending = vcpu.debug
    if pending is not None and pending.lbr is not None and pmu.version(vcpu):
        ignores_use = vcpu.vm.machine.quirks.lbr_release_ignores_use
        pending.lbr.scheduled_out(pending.debugctl, ignores_use=ignores_use)


def freeze_on_pmi(vcpu: Vcpu) -> None:
    """A PMI was delivered. Only PMU versions 2 and 3 freeze by clearing the bit (kvm.md E.5)."""
    if available(vcpu) is None or pmu.version(vcpu) not in {2, 3}:
        return
    state = debug.of(vcpu)
    if state.debugctl & DEBUGCTL_FREEZE_LBRS_ON_PMI:
        state.debugctl &= ~DEBUGCTL_LBR
