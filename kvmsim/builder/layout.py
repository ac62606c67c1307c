"""The root directory of an emulated host: which files and cgroups are where.

Bind or chroot what a program needs: ``sys/fs/cgroup`` is the v2 hierarchy, the rest are the texts
by which programs recognise a machine.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cgfs.core.cftype import Kind
from cgfs.views import procfs
from cgfs.views.static import Directory, TextFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from cgfs.core.roots import Roots
    from kvmsim.host.machine import Machine

CGROUP = "sys/fs/cgroup"
DEBUGFS = "sys/kernel/debug/kvm"
NOTE = "EMULATED"

KVM_STATISTICS: dict[str, tuple[str, ...]] = {
    "exits": (),
    "halt_exits": ("HLT",),
    "io_exits": ("IO",),
    "mmio_exits": ("MMIO",),
    "signal_exits": ("INTR",),
}
"""KVM's files in debugfs -> the exits each counts; nothing for all of them."""

NOTE_TEXT = """\
This is an emulated host, made by kvmsim. Nothing here is hardware: its processors, SEV ASIDs, TDX
keys and bus locks are a model, and no memory of any guest is encrypted.

preset: {preset}
"""


def host_root(
    roots: Roots, machine: Machine, preset_name: str, statistics: dict[str, Callable[[], int]]
) -> Directory:
    """The tree of a host root.

    Args:
        roots: its hierarchies.
        machine: where module parameters and ``/proc/cpuinfo`` come from.
        preset_name: for the note that says this is no hardware.
        statistics: debugfs files of KVM, each the sum over all VMs.
    """
    top = Directory(roots)

    def add(path: str, text: Callable[[], str], kind: Kind = Kind.CONFIG) -> None:
        parent, _, name = path.rpartition("/")
        directory = top.subdirectory(roots, parent) if parent else top
        directory.entries[name] = TextFile(roots, text, kind)

    note = NOTE_TEXT.format(preset=preset_name)
    add(NOTE, lambda: note)
    add("proc/cgroups", lambda: procfs.cgroups(roots), Kind.LIVE)
    add("proc/cpuinfo", lambda: machine.cpuinfo)
    for path, text in machine.parameters.items():
        add(f"sys/module/{path}", partial(str, text))
    for name, count in statistics.items():
        add(f"{DEBUGFS}/{name}", partial(_line, count), Kind.LIVE)
    parent, _, name = CGROUP.rpartition("/")
    top.subdirectory(roots, parent).entries[name] = roots.v2.root
    return top


def _line(count: Callable[[], int]) -> str:
    return f"{count()}\n"
