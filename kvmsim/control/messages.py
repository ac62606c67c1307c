"""Parameters and results of the methods a host answers, as both ends see them.

Commands print the results with ``--json`` as they are, so a field is part of the command line's
interface: renaming one is a change for users.
"""

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
# One line of a table, and one component of a path.
VmName = Annotated[str, msgspec.Meta(pattern=r"^[^/\x00-\x1f\x7f]+$")]


class Nothing(msgspec.Struct, frozen=True):
    """No parameters, or nothing to tell."""


class LbrState(msgspec.Struct, frozen=True):
    """Parameters and result of ``host.lbr``, and the notice ``lbr`` to supervisors.

    Attributes:
        taken: a program of the host has the last-branch records of all CPUs.
    """

    taken: bool


class StartVm(msgspec.Struct, frozen=True):
    """Parameters of ``vm.start``.

    Attributes:
        name: unique on the host.
        type: one of ``default``, ``sev``, ``sev-es``, ``snp``, ``tdx``.
        cgroup: path from the root of the v2 hierarchy; None for the caller's own cgroup.
        guest: what the guest does: words as ``buslock rate=5000``.
        vcpus: how many vCPUs run that.
        bus_lock_ratelimit: QEMU's machine property, bus locks a second; 0 is off.
        seed: chance of the guest; None takes one from the host's.
    """

    name: VmName
    type: str = "default"
    cgroup: str | None = None
    guest: str = "idle"
    vcpus: Positive = 1
    bus_lock_ratelimit: Count = 0
    seed: int | None = None


class NamedVm(msgspec.Struct, frozen=True):
    """Parameters of the methods about one VM."""

    name: str


class VcpuSnapshot(msgspec.Struct, frozen=True):
    """One vCPU: its state and what it has done since it started."""

    id: int
    state: str
    runs: int
    bus_locks: int
    throttled_ns: int


class VmSnapshot(msgspec.Struct, frozen=True):
    """One VM.

    Attributes:
        name: unique on the host.
        type: as it was started.
        pid: emulated process that owns it; it is in ``cgroup.procs``.
        cgroup: where that process is at present.
        state: ``frozen``, or as QEMU names it: ``running``, ``internal-error``.
        asid: address space id; None for a VM without one.
        guest: what the guest does.
        uptime_ns: host time since it started.
        bus_lock_ratelimit: bus locks a second that its VMM lets through; 0 is off.
        bus_locks: how many its vCPUs took.
        bus_lock_exits: how many of them its VMM saw.
        throttled_ns: vCPU time spent waiting in the kernel for ``bus_lock.max``.
        ratelimit_ns: vCPU time spent sleeping in the VMM for ``bus_lock_ratelimit``.
        vcpus: one snapshot each.
        error: why it is in ``internal-error``; empty otherwise.
    """

    name: str
    type: str
    pid: int
    cgroup: str
    state: str
    asid: int | None
    guest: str
    uptime_ns: int
    bus_lock_ratelimit: int
    bus_locks: int
    bus_lock_exits: int
    throttled_ns: int
    ratelimit_ns: int
    vcpus: list[VcpuSnapshot]
    error: str = ""


class Resource(msgspec.Struct, frozen=True):
    """How much of a counted resource there is and is in use."""

    capacity: int
    used: int


class HostSnapshot(msgspec.Struct, frozen=True):
    """A host.

    Attributes:
        directory: where it is mounted; empty for a host without a mount.
        preset: name or file the machine was described by.
        description: that machine in a few words.
        vendor: ``amd`` or ``intel``.
        cpus: logical CPUs.
        controllers: cgroup controllers, in the order files list them.
        resources: ASIDs and keys by the misc controller's name for them.
        vms: how many VMs run.
        cgroups: how many cgroups there are, the root included.
        process_tracking: how forks and exits of real processes are learned.
        seed: the chance of its guests.
        uptime_ns: host time since it started.
        pid: process that serves it.
        uid: user it belongs to.
        socket: its control socket.
        log: what it logs.
    """

    directory: str
    preset: str
    description: str
    vendor: str
    cpus: int
    controllers: list[str]
    resources: dict[str, Resource]
    vms: int
    cgroups: int
    process_tracking: str
    seed: int
    uptime_ns: int
    pid: int
    uid: int
    socket: str
    log: str
