"""The few machine-wide things KVM asks for: a charge for an ASID, admission of a bus lock.

KVM sees only the :class:`Accounting` interface. :class:`CgroupAccounting` answers it with direct
calls into the cgroup model of the same process.

Both accounting interfaces of SEV stand side by side: ``encryption_ids`` and ``misc``. A guest is
charged to every one of the two the host has, ``encryption_ids`` first; when the second refuses, the
first is undone. A charge remembers the states it was made to, so that it ends where it began even
after the process moved or the directory was removed.
"""

from __future__ import annotations

from errno import EBUSY
from typing import TYPE_CHECKING, Protocol, cast

from cgfs.errors import CgroupError

if TYPE_CHECKING:
    from cgfs.core.budget import Waiter
    from cgfs.core.roots import Roots

#: Controllers a guest of each kind is charged to, in order. Only misc knows trust domains.
CHARGED_BY = {
    "sev": ("encryption_ids", "misc"),
    "sev_es": ("encryption_ids", "misc"),
    "tdx": ("misc",),
}


class ChargedCss(Protocol):
    """The two verbs of a controller's per-cgroup state that accounting uses."""

    def try_charge(self, resource: str, amount: int) -> None:
        """Charge this cgroup and its ancestors, or raise and leave all untouched."""

    def uncharge(self, resource: str, amount: int) -> None:
        """Give back."""

    def fits(self, resource: str, amount: int) -> bool:
        """Whether a charge would pass by now."""


class BusLockState(Protocol):
    """What accounting uses of a cgroup's bus lock limiter."""

    def request(self, waiter: Waiter, now_ns: int) -> bool:
        """Admit one bus lock now (True) or queue it."""

    def limited(self) -> bool:
        """Whether this cgroup or an ancestor has a finite limit."""


class BusLockQueues(Protocol):
    """What accounting uses of the bus lock controller itself."""

    def withdraw(self, waiter: Waiter, now_ns: int) -> bool:
        """Take a waiter out of its queue; its event stays owed."""

    def cancel(self, waiter: Waiter, css: BusLockState, now_ns: int) -> bool:
        """Drop a waiter's event, queued, owed, or still to be asked for."""

    def move(self, waiter: Waiter, css: BusLockState, now_ns: int) -> None:
        """Queue a waiter elsewhere: its task moved."""


class AsidCharge:
    """One unit of one kind, charged.

    Attributes:
        kind: ``sev``, ``sev_es`` or ``tdx``.
        charged: the states that carry it, in the order they were charged.
    """

    __slots__ = ("charged", "kind")

    def __init__(self, kind: str, charged: tuple[ChargedCss, ...]) -> None:
        self.kind = kind
        self.charged = charged


class Accounting(Protocol):
    """What KVM asks of the machine it runs on."""

    def charge_asid(self, pid: int, kind: str) -> AsidCharge:
        """Charge one unit to the cgroup a process is in now.

        Args:
            pid: the calling process.
            kind: ``sev``, ``sev_es`` or ``tdx``.

        Raises:
            CgroupError: EBUSY over a limit or the capacity (``ChargeRefused`` names which), EINVAL
                when the machine has none of this kind. Nothing is charged then.
        """

    def uncharge_asid(self, charge: AsidCharge, kind: str | None = None) -> None:
        """End a charge, once, wherever the process is by now.

        Args:
            charge: what was charged.
            kind: the kind to give back when it is not the one that was charged: the kernel's
                mistake ``move_charges_wrong_type``.
        """

    def is_charged_to(self, pid: int, charge: AsidCharge) -> bool:
        """Whether the cgroup a process is in now is the one that carries a charge."""

    def bus_lock(self, pid: int, waiter: Waiter, now_ns: int) -> bool:
        """Ask for admission of one bus lock.

        Returns:
            True: admitted. False: queued; ``waiter.admitted`` is called once, later.
        """

    def bus_lock_withdraw(self, waiter: Waiter, now_ns: int) -> None:
        """A wait was interrupted: leave the queue. The event stays owed and is asked for again."""

    def bus_lock_cancel(self, pid: int, waiter: Waiter, now_ns: int) -> None:
        """The vCPU is gone: drop its event, asked for or not. Nothing is charged."""

    def bus_lock_moved(self, pid: int, waiter: Waiter, now_ns: int) -> None:
        """The process of a queued waiter is in another cgroup now."""

    def bus_lock_limited(self, pid: int) -> bool:
        """Whether a finite ``bus_lock.max`` applies to a process."""


class CgroupAccounting:
    """Accounting by the cgroups of this process's own model.

    Args:
        roots: all hierarchies of the host; a controller it lacks is not asked.
    """

    __slots__ = ("_charging", "_limiter", "_roots")

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        present = {name for name in ("encryption_ids", "misc", "bus_lock") if has(roots, name)}
        self._charging = {
            kind: tuple(name for name in names if name in present)
            for kind, names in CHARGED_BY.items()
        }
        self._limiter = (
            cast("BusLockQueues", roots.controller("bus_lock")) if "bus_lock" in present else None
        )

    def charge_asid(self, pid: int, kind: str) -> AsidCharge:
        """See :meth:`Accounting.charge_asid`."""
        charged: list[ChargedCss] = []
        for controller in self._charging[kind]:
            css = cast("ChargedCss", self._roots.css_of(pid, controller))
            try:
                css.try_charge(kind, 1)
            except CgroupError as refused:
                for earlier in reversed(charged):
                    earlier.uncharge(kind, 1)
                if controller == "encryption_ids" and refused.errno != EBUSY:
                    # The posted series preset EBUSY for any failed charge (cgroup.md A.9).
                    raise CgroupError(EBUSY, str(refused)) from refused
                raise
            charged.append(css)
        return AsidCharge(kind, tuple(charged))

    def uncharge_asid(self, charge: AsidCharge, kind: str | None = None) -> None:
        """See :meth:`Accounting.uncharge_asid`."""
        charged, charge.charged = charge.charged, ()
        for css in reversed(charged):
            css.uncharge(kind or charge.kind, 1)

    def fits(self, pid: int, kind: str) -> bool:
        """Whether a charge to the cgroup a process is in now would be within every limit."""
        states = (self._roots.css_of(pid, name) for name in self._charging[kind])
        return all(cast("ChargedCss", css).fits(kind, 1) for css in states)

    def is_charged_to(self, pid: int, charge: AsidCharge) -> bool:
        """See :meth:`Accounting.is_charged_to`."""
        now: list[object] = [self._roots.css_of(pid, name) for name in self._charging[charge.kind]]
        return now == list(charge.charged)

    def bus_lock(self, pid: int, waiter: Waiter, now_ns: int) -> bool:
        """See :meth:`Accounting.bus_lock`."""
        if self._limiter is None:
            return True
        return self._state(pid).request(waiter, now_ns)

    def bus_lock_withdraw(self, waiter: Waiter, now_ns: int) -> None:
        """See :meth:`Accounting.bus_lock_withdraw`."""
        if self._limiter is not None:
            self._limiter.withdraw(waiter, now_ns)

    def bus_lock_cancel(self, pid: int, waiter: Waiter, now_ns: int) -> None:
        """See :meth:`Accounting.bus_lock_cancel`."""
        if self._limiter is not None:
            self._limiter.cancel(waiter, self._state(pid), now_ns)

    def bus_lock_moved(self, pid: int, waiter: Waiter, now_ns: int) -> None:
        """See :meth:`Accounting.bus_lock_moved`."""
        if self._limiter is not None:
            self._limiter.move(waiter, self._state(pid), now_ns)

    def bus_lock_limited(self, pid: int) -> bool:
        """See :meth:`Accounting.bus_lock_limited`."""
        return self._limiter is not None and self._state(pid).limited()

    def _state(self, pid: int) -> BusLockState:
        return cast("BusLockState", self._roots.css_of(pid, "bus_lock"))


def has(roots: Roots, controller: str) -> bool:
    """Whether a host was built with a controller."""
    try:
        roots.controller(controller)
    except KeyError:
        return False
    return True
