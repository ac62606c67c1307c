"""What a client supervisor and its host say to each other.

A supervisor runs the KVM of one tree of client processes; the host keeps what belongs to the whole
machine. The supervisor attaches with ``client.attach``, stays connected, and what it holds goes
back to the host when the connection ends. Pids are numbers of the supervisor's pid namespace.
"""

from __future__ import annotations

import msgspec

from kvmsim.host.presets import Preset  # noqa: TC001 - the decoder reads the annotations


class Attach(msgspec.Struct, frozen=True):
    """Parameters of ``client.attach``.

    Attributes:
        program: what runs, for people.
    """

    program: str


class Attached(msgspec.Struct, frozen=True):
    """The machine a supervisor is to run KVM on.

    Attributes:
        name: of its preset.
        preset: the preset itself, as JSON.
        directory: where the host is mounted; empty without a mount.
        lbr_taken: a program of the host has the last-branch records of all CPUs; the notice ``lbr``
            tells changes.
    """

    name: str
    preset: Preset
    directory: str
    lbr_taken: bool = False


class ForCaller(msgspec.Struct, frozen=True):
    """Parameters of ``client.take_key`` and ``client.charge``.

    Attributes:
        pid: the calling process, whose cgroup is charged.
        kind: ``sev``, ``sev_es`` or ``tdx``.
    """

    pid: int
    kind: str


class TakenKey(msgspec.Struct, frozen=True):
    """An ASID or key with its charge.

    Attributes:
        number: the ASID or the number of the key.
        charge: the charge, to be named when it ends.
    """

    number: int
    charge: int


class FreeKey(msgspec.Struct, frozen=True):
    """Parameters of ``client.free_key``: what ``client.take_key`` returned, or its successor.

    Attributes:
        number: the ASID or key.
        charge: the charge that ends with it; 0 for none.
        tdx: whether it is a trust domain key.
    """

    number: int
    charge: int
    tdx: bool = False


class EndCharge(msgspec.Struct, frozen=True):
    """Parameters of ``client.uncharge``.

    Attributes:
        charge: which.
        kind: the kind to give back, if it is not the one that was charged.
    """

    charge: int
    kind: str | None = None


class WhereCharged(msgspec.Struct, frozen=True):
    """Parameters of ``client.is_charged_to``."""

    pid: int
    charge: int


class BusLockRequest(msgspec.Struct, frozen=True):
    """Parameters of ``client.bus_lock`` and ``client.cancel``.

    Attributes:
        pid: the process whose vCPU took the lock.
        waiter: number of that vCPU among all of the supervisor; 0 to cancel a lock that was never
            asked for.
    """

    pid: int
    waiter: int


class WaiterNumber(msgspec.Struct, frozen=True):
    """Parameters of ``client.withdraw``, and of the notice ``admitted``."""

    waiter: int


class Process(msgspec.Struct, frozen=True):
    """Parameters of ``client.follow`` and ``client.unfollow``, and of the notice ``killed``."""

    pid: int


class Situation(msgspec.Struct, frozen=True):
    """What a followed process has to live with; also the notice ``situation`` when that changes.

    Attributes:
        pid: the process.
        limited: a finite ``bus_lock.max`` applies to it.
        frozen: its cgroup is frozen.
        cgroup: where it is in the v2 hierarchy.
    """

    pid: int
    limited: bool
    frozen: bool
    cgroup: str


class KernelLine(msgspec.Struct, frozen=True):
    """Parameters of ``client.log``: a line that a supervisor's part of the kernel printed."""

    line: str


class Settled(msgspec.Struct, frozen=True):
    """The notice ``settle``, and the parameters of ``client.settled`` that answer it.

    Before the host refuses one client an ASID, it asks the others to give back what has been closed
    already and lies on its way.

    Attributes:
        number: which time the host asks.
    """

    number: int


class ClientVcpu(msgspec.Struct, frozen=True):
    """One vCPU of a client's VM.

    Attributes:
        id: its id.
        pid: thread that runs it; 0: none has yet.
        state: what it does.
        exits: ``KVM_EXIT_*`` name -> count.
        bus_locks: how many it took.
        throttled_ns: time it waited for ``bus_lock.max``.
    """

    id: int
    pid: int
    state: str
    exits: dict[str, int]
    bus_locks: int
    throttled_ns: int


class ClientVm(msgspec.Struct, frozen=True):
    """One VM of a client.

    Attributes:
        key: number of the VM among all of the supervisor.
        pid: thread that made it.
        fd: descriptor it got.
        type: ``default``, ``sev``, ``sev-es``, ``snp`` or ``tdx``.
        state: what its memory encryption is at.
        asid: its ASID or key; None without one.
        bus_lock_exits: whether its VMM enabled bus lock detection.
        vcpus: its vCPUs.
    """

    key: int
    pid: int
    fd: int
    type: str
    state: str
    asid: int | None
    bus_lock_exits: bool
    vcpus: list[ClientVcpu]


class VmReport(msgspec.Struct, frozen=True):
    """Parameters of ``client.report``: what has changed.

    Attributes:
        vms: VMs that are new or have done something.
        gone: keys of those that are destroyed.
    """

    vms: list[ClientVm] = []
    gone: list[int] = []
