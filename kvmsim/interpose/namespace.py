"""What a client sees of the machine: its own /dev, /sys/module and cgroup tree.

Runs in the forked child, in a mount namespace of its own, so nothing has to be undone. Devices are
placeholder nodes: opening them needs no help, and what is behind a descriptor is told by the
node's (device, inode).
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsim.interpose import libc

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Identity = tuple[int, int]
"""(st_dev, st_ino)."""

# Harmless devices to stand in where a new node cannot be made, which is so in a user namespace.
# Nobody sends these a KVM request.
_STAND_INS = {"kvm": "full", "sev": "zero"}
_NULL_DEVICE = os.makedev(1, 3)
_KVM_MODULES = ("kvm", "kvm_amd", "kvm_intel")


def enter() -> None:
    """Leave for a mount namespace of its own, in a user namespace if that takes one."""
    try:
        libc.unshare(libc.CLONE_NEWNS)
    except PermissionError:
        uid, gid = os.getuid(), os.getgid()
        libc.unshare(libc.CLONE_NEWUSER | libc.CLONE_NEWNS)
        with suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", encoding="utf-8")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", encoding="utf-8")
    libc.mount("none", "/", "", libc.MS_REC | libc.MS_PRIVATE)


def private_dev(devices: Sequence[str]) -> dict[str, Identity]:
    """Put a tmpfs over /dev that shows all of the old one, and ours.

    Args:
        devices: names of the nodes to make; with any, the machine's own /dev/kvm and /dev/sev are
            hidden. Empty: leave /dev as it is.

    Returns:
        How each is recognised.
    """
    if not devices:
        return {}
    old = os.open("/dev", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        libc.mount("kvmsim", "/dev", "tmpfs", libc.MS_NOSUID, "mode=755,size=1m")
        _bind_entries(f"/proc/self/fd/{old}", "/dev", hidden=(*devices, "kvm", "sev"))
        return {name: _placeholder(name, old) for name in devices}
    finally:
        os.close(old)


def module_parameters(parameters: Mapping[str, str]) -> None:
    """Show an emulated kernel's KVM modules in /sys/module, beside all others.

    Args:
        parameters: path below /sys/module -> text. Empty: leave everything as it is.
    """
    if not parameters or not Path("/sys/module").is_dir():
        return
    old = os.open("/sys/module", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    libc.mount("kvmsim", "/sys/module", "tmpfs", libc.MS_NOSUID, "mode=755,size=1m")
    new = os.open("/sys/module", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _write_parameters(parameters)
        shown = {path.split("/", 1)[0] for path in parameters}
        with suppress(OSError):
            # Character device 0/0: overlayfs shows nothing of that name.
            for module in set(_KVM_MODULES) - shown:
                os.mknod(f"/sys/module/{module}", stat.S_IFCHR, 0)
        layers = f"lowerdir=/proc/self/fd/{new}:/proc/self/fd/{old}"
        try:
            libc.mount("kvmsim", "/sys/module", "overlay", libc.MS_RDONLY, layers)
        except OSError:
            _bind_entries(f"/proc/self/fd/{old}", "/sys/module", hidden=_KVM_MODULES)
    finally:
        os.close(old)
        os.close(new)


def cgroup_tree(directory: str) -> None:
    """Show a cgroup tree where programs look for it."""
    libc.mount(directory, "/sys/fs/cgroup", "", libc.MS_BIND | libc.MS_REC)


def _placeholder(name: str, old: int) -> Identity:
    """Make a node that can be opened and does nothing."""
    path = f"/dev/{name}"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, _NULL_DEVICE)
        Path(path).chmod(0o666)
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        with suppress(FileNotFoundError):
            Path(path).unlink()
        Path(path).touch()
        stand_in = _STAND_INS.get(name, "full")
        libc.mount(f"/proc/self/fd/{old}/{stand_in}", path, "", libc.MS_BIND)
    status = Path(path).stat()
    return status.st_dev, status.st_ino


def _write_parameters(parameters: Mapping[str, str]) -> None:
    for path, text in parameters.items():
        file = Path("/sys/module", path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        file.chmod(0o444)


def _bind_entries(source: str, target: str, hidden: Sequence[str]) -> None:
    """Show every entry of one directory in another; one that cannot be shown is left out."""
    for entry in os.scandir(source):
        if entry.name in hidden:
            continue
        path = Path(target, entry.name)
        with suppress(OSError):
            if entry.is_symlink():
                path.symlink_to(Path(entry.path).readlink())
                continue
            if entry.is_dir(follow_symlinks=False):
                path.mkdir(exist_ok=True)
            else:
                path.touch()
            libc.mount(entry.path, str(path), "", libc.MS_BIND | libc.MS_REC)
