"""Encryption keys with the charge each one carries.

Charging a cgroup and taking a key is one synchronous step: either both happened or neither.
"""

from __future__ import annotations

from errno import ENOSPC
from typing import TYPE_CHECKING, ClassVar

from cgfs.errors import CgroupError
from kvmsim.errors import KvmError
from kvmsim.sev.asid import Asid, AsidPool

if TYPE_CHECKING:
    from kvmsim.host.accounting import Accounting, AsidCharge
    from kvmsim.host.machine import Machine


class Key:
    """What an encrypted guest holds while it lives.

    Attributes:
        asid: its ASID; for a trust domain the number of its key.
        charge: where it is charged.
        kind: what it is: ``sev``, ``sev_es`` or ``tdx``. A charge says the same, except after a
            move with ``move_charges_wrong_type``.
    """

    __slots__ = ("asid", "charge", "kind")

    def __init__(self, asid: Asid, charge: AsidCharge) -> None:
        self.asid = asid
        self.charge = charge
        self.kind = charge.kind


class Keys:
    """Everything a machine can encrypt guests with.

    Args:
        machine: whose ASIDs and keys these are.

    Attributes:
        asids: the SEV allocator.
        tdx_free: trust domain keys nobody holds.
        ALLOCATES: ASIDs are handed out and flushed here. False: somewhere else, and whatever comes
            from there was flushed since its last use.
    """

    __slots__ = ("_accounting", "asids", "tdx_free")
    ALLOCATES: ClassVar[bool] = True

    def __init__(self, machine: Machine) -> None:
        sev = machine.sev
        self._accounting: Accounting = machine.accounting
        self.asids = AsidPool(
            sev.min_sev_asid, sev.max_sev_asid, flush_fails=machine.preset.faults.df_flush
        )
        tdx = machine.preset.tdx
        # Key id 0 is "no encryption"; the numbers above it are a model, nobody sees them.
        self.tdx_free = set(range(1, tdx.keys + 1)) if tdx is not None else set()

    def take_asid(self, pid: int, *, es: bool) -> Key:
        """Charge the cgroup of a process and take an ASID (kvm.md D.2).

        Raises:
            KvmError: ENOTTY no such ASIDs on this machine, nothing charged; EBUSY a limit, the
                capacity or the pool is exhausted; EINVAL the capacity of the kind is 0. A refusal
                by a cgroup is the ``__cause__``.
        """
        self.asids.check_range(es=es)
        charge = self._charge(pid, "sev_es" if es else "sev")
        try:
            return Key(self.asids.take(es=es), charge)
        except KvmError:
            self._accounting.uncharge_asid(charge)
            raise

    def free_asid(self, key: Key) -> None:
        """Give an ASID back and end its charge, wherever its process is by now."""
        self.asids.free(key.asid)
        wrong = key.kind != key.charge.kind
        self._accounting.uncharge_asid(key.charge, key.kind if wrong else None)

    # -- moving ----------------------------------------------------------------------------

    def is_charged_to(self, pid: int, key: Key) -> bool:
        """Whether the cgroup a process is in now is the one a key is charged to."""
        return self._accounting.is_charged_to(pid, key.charge)

    def charge(self, pid: int, kind: str) -> AsidCharge:
        """Charge the cgroup of a process for a guest that comes with its key.

        Raises:
            KvmError: EBUSY a limit or the capacity; EINVAL the capacity of the kind is 0.
        """
        return self._charge(pid, kind)

    def cancel(self, charge: AsidCharge) -> None:
        """The guest does not come."""
        self._accounting.uncharge_asid(charge)

    def recharge(self, key: Key, charge: AsidCharge, uncharge_as: str | None) -> None:
        """The guest came: the new charge is the key's, the old one ends.

        Args:
            key: of the guest.
            charge: made beforehand.
            uncharge_as: the kind to give back for the old one, if it is the wrong one.
        """
        old, key.charge = key.charge, charge
        self._accounting.uncharge_asid(old, uncharge_as)

    # -- trust domains ---------------------------------------------------------------------

    def take_tdx(self, pid: int) -> Key:
        """Take a trust domain key and charge the cgroup of a process.

        The key comes first, unlike an ASID: Linux 6.16 ``arch/x86/kvm/vmx/tdx.c``,
        ``__tdx_td_init``.

        Raises:
            KvmError: ENOSPC no key left; EBUSY a limit refused.
        """
        if not self.tdx_free:
            raise KvmError(ENOSPC, "no TDX key: all of the host's are in use")
        charge = self._charge(pid, "tdx")
        number = min(self.tdx_free)
        self.tdx_free.remove(number)
        return Key(Asid(number), charge)

    def free_tdx(self, key: Key) -> None:
        """Give a trust domain key back and end its charge."""
        self.tdx_free.add(key.asid)
        self._accounting.uncharge_asid(key.charge)

    def _charge(self, pid: int, kind: str) -> AsidCharge:
        try:
            return self._accounting.charge_asid(pid, kind)
        except CgroupError as refused:
            raise KvmError(refused.errno, f"no {kind} charge: {refused}") from refused
