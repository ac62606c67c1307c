"""encryption_ids.*: SEV and SEV-ES ASIDs under the interface posted in January 2021 (v4).

One value per file, 32 bits wide, no events::

    /            encryption_ids.sev.stat       total 10, used 2
    └── tenant   encryption_ids.sev.max 2      at most two of the ten, in and below tenant
        └── a    encryption_ids.sev.current 2  holds both: a third charge is EBUSY

A limit may be above the total or below what is held: nothing is taken back, only new charges
are refused. A charge stays where it was made, whatever becomes of process and directory.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL
from functools import partial
from typing import TYPE_CHECKING, cast

from cgfs.core.cftype import CFType, Kind, On
from cgfs.core.css import Controller, Css
from cgfs.core.parse import U32_MAX, parse_limit, show_limit, strip
from cgfs.errors import CgroupError, ChargeRefused

if TYPE_CHECKING:
    from cgfs.core.caller import Caller
    from cgfs.core.cgroup import Cgroup

TYPES = ("sev", "sev_es")


class EncryptionIdsCss(Css):
    """Limit and usage of one cgroup, by type, unsigned 32-bit each."""

    __slots__ = ("max", "usage")

    controller: EncryptionIds
    parent: EncryptionIdsCss | None

    def __init__(
        self,
        controller: EncryptionIds,
        cgrp: Cgroup,
        parent: Css | None,
        owner: Caller,
        now_ns: int,
    ) -> None:
        super().__init__(controller, cgrp, parent, owner, now_ns)
        self.max = [U32_MAX] * len(TYPES)
        self.usage = [0] * len(TYPES)

    def try_charge(self, type: str, amount: int = 1) -> None:
        """Charge this cgroup and all its ancestors, or none.

        Raises:
            CgroupError: EINVAL for a bad type or one without capacity.
            ChargeRefused: at the lowest cgroup where the usage would pass its limit or the
                capacity; nothing is counted or notified.
        """
        index = self.controller.index(type)
        if not amount:
            return
        capacity = self.controller.capacity[index]
        if not capacity:
            raise CgroupError(EINVAL)
        for css in self.ancestors():
            new = css.usage[index] + amount
            if new > css.max[index]:
                file, value = f"encryption_ids.{type}.max", str(css.max[index])
                raise ChargeRefused(type, css.cgrp.path, file, value)
            if new > capacity:
                file, value = f"encryption_ids.{type}.stat", f"total {capacity}"
                raise ChargeRefused(type, css.cgrp.path, file, value)
        for css in self.ancestors():
            css.usage[index] += amount
        self.pin()

    def fits(self, type: str, amount: int = 1) -> bool:
        """Whether a charge would be within every limit by now."""
        index = self.controller.index(type)
        capacity = self.controller.capacity[index]
        states = self.ancestors()
        return all(css.usage[index] + amount <= min(css.max[index], capacity) for css in states)

    def uncharge(self, type: str, amount: int = 1) -> None:
        """Return a charge made here; it works on a removed cgroup as well."""
        index = self.controller.index(type)
        if not amount:
            return
        for css in self.ancestors():
            css.usage[index] -= amount
            if css.usage[index] < 0 and not self.controller.below_zero:
                msg = f"{css.cgrp.path}: {type} uncharged below zero"
                raise AssertionError(msg)
        self.unpin()


def _max_show(css: EncryptionIdsCss, _caller: Caller, *, index: int) -> str:
    return f"{show_limit(css.max[index], U32_MAX)}\n"


def _max_write(
    css: EncryptionIdsCss, text: bytes, _opener: Caller, _now_ns: int, *, index: int
) -> None:
    css.max[index] = parse_limit(strip(text), U32_MAX)


def _current_show(css: EncryptionIdsCss, _caller: Caller, *, index: int) -> str:
    return f"{css.usage[index]}\n"


def _stat_show(css: EncryptionIdsCss, _caller: Caller, *, index: int) -> str:
    return f"total {css.controller.capacity[index]}\nused {css.usage[index]}\n"


def _files_of(type: str, index: int) -> tuple[CFType, ...]:
    return (
        CFType(
            f"encryption_ids.{type}.max",
            show=partial(_max_show, index=index),
            write=partial(_max_write, index=index),
            on=On.NON_ROOT,
            doc=f"How many {type} IDs the cgroup and its descendants may hold, or `max`.",
        ),
        CFType(
            f"encryption_ids.{type}.current",
            show=partial(_current_show, index=index),
            on=On.NON_ROOT,
            kind=Kind.LIVE,
            doc=f"How many {type} IDs they hold.",
        ),
        CFType(
            f"encryption_ids.{type}.stat",
            show=partial(_stat_show, index=index),
            on=On.ROOT,
            kind=Kind.LIVE,
            doc=f"`total`: {type} IDs of the machine; `used`: those in use.",
        ),
    )


class EncryptionIds(Controller):
    """The encryption_ids controller of one host.

    Attributes:
        capacity: IDs of the machine, in the order of ``TYPES``.
        below_zero: usage may fall below 0; else that is an error of ours.
    """

    name = "encryption_ids"
    files = tuple(row for index, word in enumerate(TYPES) for row in _files_of(word, index))

    def __init__(self) -> None:
        super().__init__()
        self.capacity = [0] * len(TYPES)
        self.below_zero = False

    def css_alloc(
        self, cgrp: Cgroup, parent: Css | None, owner: Caller, now_ns: int
    ) -> EncryptionIdsCss:
        """State without limits or charges."""
        return EncryptionIdsCss(self, cgrp, parent, owner, now_ns)

    def index(self, type: str) -> int:
        """Position of a type.

        Raises:
            CgroupError: EINVAL for a bad one.
        """
        if type not in TYPES:
            raise CgroupError(EINVAL)
        return TYPES.index(type)

    def set_capacity(self, type: str, capacity: int) -> None:
        """Register what the machine has.

        Raises:
            CgroupError: EINVAL for a bad type, EBUSY when more is in use.
        """
        index = self.index(type)
        if cast("EncryptionIdsCss", self.root_css()).usage[index] > capacity:
            raise CgroupError(EBUSY)
        self.capacity[index] = capacity


CONTROLLER = EncryptionIds
