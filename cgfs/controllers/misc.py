"""misc.*: SEV and SEV-ES ASIDs, TDX keys and other counted resources (Linux 5.13, as of 6.16).

A resource has a capacity on the machine, and a cgroup may limit how much of it its subtree
holds. A charge counts in the charging cgroup and all its ancestors, or nowhere::

    /            capacity sev 10
    └── tenant   misc.max "sev 2"      at most two of the ten, in and below tenant
        └── a    misc.current "sev 2"  holds both: a third charge is EBUSY and counts one
                                       "sev.max" in tenant's misc.events and misc.events.local

Limits may be above the capacity or below what is held: nothing is taken back, only new charges
are refused. A charge stays where it was made, whatever becomes of process and directory.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING, cast

from cgfs.core.cftype import CFType, Kind, On
from cgfs.core.css import Controller, Css
from cgfs.core.parse import U64_MAX, parse_limit, show_limit, strip
from cgfs.errors import CgroupError, ChargeRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from cgfs.core.caller import Caller
    from cgfs.core.cgroup import Cgroup

# Resources a kernel with AMD SEV and Intel TDX support has, in the order in which it prints them.
COMPILED_IN = ("sev", "sev_es", "tdx")


class Resource:
    """Account of one resource in one cgroup; all values unsigned 64-bit."""

    __slots__ = ("events", "events_local", "max", "peak", "usage")

    def __init__(self) -> None:
        self.max = U64_MAX
        self.usage = 0
        self.peak = 0
        self.events = 0
        self.events_local = 0


_UNUSED = Resource()


class MiscCss(Css):
    """The resources of one cgroup; an account is made when something is first counted."""

    __slots__ = ("_accounts",)

    controller: Misc
    parent: MiscCss | None

    def __init__(
        self, controller: Misc, cgrp: Cgroup, parent: Css | None, owner: Caller, now_ns: int
    ) -> None:
        super().__init__(controller, cgrp, parent, owner, now_ns)
        self._accounts: dict[str, Resource] | None = None

    def account(self, resource: str) -> Resource:
        """The account of a resource, to look at."""
        return (self._accounts or {}).get(resource, _UNUSED)

    def own_account(self, resource: str) -> Resource:
        """The account of a resource, to change."""
        if self._accounts is None:
            self._accounts = {}
        return self._accounts.setdefault(resource, Resource())

    def try_charge(self, resource: str, amount: int = 1) -> None:
        """Charge this cgroup and all its ancestors, or none.

        Raises:
            CgroupError: EINVAL for an unknown resource or one without capacity.
            ChargeRefused: at the lowest cgroup where the usage would pass its limit or the
                capacity; that one's ``events.local`` and the ``events`` of it and its ancestors
                count one. Peaks reached below it stay (Linux 6.12 misc.c).
        """
        capacity = self.controller.capacity_of(resource)
        if not capacity:
            raise CgroupError(EINVAL)
        if not amount:
            return
        charged: list[Resource] = []
        for css in self.ancestors():
            account = css.own_account(resource)
            new = account.usage + amount
            if new > account.max or new > capacity:
                for below in charged:
                    below.usage -= amount
                css.count_event(resource)
                raise css.refusal(resource, over_max=new > account.max)
            account.usage = new
            account.peak = max(account.peak, new)
            charged.append(account)
        self.pin()

    def fits(self, resource: str, amount: int = 1) -> bool:
        """Whether a charge would be within every limit by now; counts nothing."""
        capacity = self.controller.capacity_of(resource)
        accounts = (css.account(resource) for css in self.ancestors())
        return all(account.usage + amount <= min(account.max, capacity) for account in accounts)

    def uncharge(self, resource: str, amount: int = 1) -> None:
        """Return a charge made here; it works on a removed cgroup as well."""
        if not amount:
            return
        for css in self.ancestors():
            account = css.own_account(resource)
            account.usage -= amount
            if account.usage < 0 and not self.controller.below_zero:
                msg = f"{css.cgrp.path}: {resource} uncharged below zero"
                raise AssertionError(msg)
        self.unpin()

    def refusal(self, resource: str, *, over_max: bool) -> ChargeRefused:
        """The error that names what refused a charge."""
        if over_max:
            limit = show_limit(self.account(resource).max, U64_MAX)
            return ChargeRefused(resource, self.cgrp.path, "misc.max", f"{resource} {limit}")
        capacity = self.controller.capacity_of(resource)
        return ChargeRefused(resource, self.cgrp.path, "misc.capacity", f"{resource} {capacity}")

    def count_event(self, resource: str) -> None:
        """Count a refusal here, and in every ancestor that has the files."""
        self.own_account(resource).events_local += 1
        if self.parent is not None:
            self.notify("misc.events.local")
        for css in self.ancestors():
            if css.parent is not None:
                css.own_account(resource).events += 1
                css.notify("misc.events")


def _lines(css: MiscCss, value: Callable[[str, Resource], str | None]) -> str:
    lines = []
    for resource in css.controller.resources:
        text = value(resource, css.account(resource))
        if text is not None:
            lines.append(f"{resource}{text}\n")
    return "".join(lines)


def _capacity_show(css: MiscCss, _caller: Caller) -> str:
    capacity = css.controller.capacity_of
    return _lines(css, lambda name, _: f" {capacity(name)}" if capacity(name) else None)


def _max_show(css: MiscCss, _caller: Caller) -> str:
    capacity = css.controller.capacity_of
    return _lines(css, lambda name, r: f" {show_limit(r.max, U64_MAX)}" if capacity(name) else None)


def _max_write(css: MiscCss, text: bytes, _opener: Caller, _now_ns: int) -> None:
    name, space, value = strip(text).partition(b" ")
    resource = name.decode("latin-1")
    if not space or resource not in css.controller.resources:
        raise CgroupError(EINVAL)
    limit = parse_limit(value, U64_MAX)
    if not css.controller.capacity_of(resource):
        raise CgroupError(EINVAL)
    css.own_account(resource).max = limit


def _counts(css: MiscCss, value: Callable[[Resource], int], label: str = " ") -> str:
    """A line for each resource that has a capacity or a count."""
    capacity = css.controller.capacity_of

    def text(name: str, account: Resource) -> str | None:
        count = value(account)
        return f"{label}{count & U64_MAX}" if capacity(name) or count else None

    return _lines(css, text)


def _current_show(css: MiscCss, _caller: Caller) -> str:
    return _counts(css, lambda account: account.usage)


def _peak_show(css: MiscCss, _caller: Caller) -> str:
    return _counts(css, lambda account: account.peak)


def _events_show(css: MiscCss, _caller: Caller) -> str:
    return _counts(css, lambda account: account.events, ".max ")


def _events_local_show(css: MiscCss, _caller: Caller) -> str:
    return _counts(css, lambda account: account.events_local, ".max ")


class Misc(Controller):
    """The misc controller of one host.

    Attributes:
        resources: names of all resources, in print order.
        below_zero: usage may fall below 0, where Linux only warns; else that is an error of ours.
    """

    name = "misc"
    files = (
        CFType(
            "misc.capacity",
            show=_capacity_show,
            on=On.ROOT,
            doc="What the machine has of each resource.",
        ),
        CFType(
            "misc.max",
            show=_max_show,
            write=_max_write,
            on=On.NON_ROOT,
            doc="Limit of each resource that has a capacity; write `<resource> <number|max>`.",
        ),
        CFType(
            "misc.current",
            show=_current_show,
            kind=Kind.LIVE,
            doc="What the cgroup and its descendants hold.",
        ),
        CFType(
            "misc.peak",
            show=_peak_show,
            kind=Kind.LIVE,
            doc="The most it ever held; a refused charge may raise it.",
        ),
        CFType(
            "misc.events",
            show=_events_show,
            on=On.NON_ROOT,
            kind=Kind.LIVE,
            notify=True,
            doc="`<resource>.max`: refusals here and below; every change generates an event.",
        ),
        CFType(
            "misc.events.local",
            show=_events_local_show,
            on=On.NON_ROOT,
            kind=Kind.LIVE,
            notify=True,
            doc="The same, only those this very cgroup refused.",
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.resources: list[str] = list(COMPILED_IN)
        self._capacity: dict[str, int] = {}
        self.below_zero = False

    def css_alloc(self, cgrp: Cgroup, parent: Css | None, owner: Caller, now_ns: int) -> MiscCss:
        """State without limits or charges."""
        return MiscCss(self, cgrp, parent, owner, now_ns)

    def add_resource(self, resource: str) -> None:
        """Know a resource beyond those of the kernel, printed after them."""
        if resource not in self.resources:
            self.resources.append(resource)

    def capacity_of(self, resource: str) -> int:
        """What the machine has; 0 for a resource nobody registered."""
        return self._capacity.get(resource, 0)

    def set_capacity(self, resource: str, capacity: int) -> None:
        """Register what the machine has; it may be below what is held (misc_cg_set_capacity()).

        Raises:
            CgroupError: EINVAL for an unknown resource.
        """
        if resource not in self.resources:
            raise CgroupError(EINVAL)
        shown_before = bool(self.capacity_of(resource))
        self._capacity[resource] = capacity
        root = cast("MiscCss", self.root_css())
        root.changed("misc.capacity")
        if shown_before != bool(capacity):
            for cgrp in root.cgrp.subtree():
                css = cgrp.css.get(self.name)
                if css is not None and css.parent is not None:
                    css.changed("misc.max")


CONTROLLER = Misc
