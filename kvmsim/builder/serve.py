"""The process behind ``kvmsim up``: a host with a mount, real processes and a control socket."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from cgfs.control import serving
from cgfs.control.server import Server, owner_and_root
from cgfs.fuse import mount as fuse
from cgfs.procs import watch
from cgfs.procs.choose import best_source
from cgfs.procs.record import RecordedProcesses
from cgfs.procs.release_agent import ReleaseAgent
from kvmsim.builder.host import Host
from kvmsim.control.client_methods import client_methods
from kvmsim.control.explain import explain
from kvmsim.control.methods import host_methods

if TYPE_CHECKING:
    from cgfs.control.launch import Launch
    from kvmsim.host.presets import Preset

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostOptions:
    """A host as its user described it.

    Attributes:
        name: of the preset, as given.
        preset: the machine.
        controllers: cgroup controllers of its kernel.
        seed: chance of its guests.
        source: what /proc/mounts shows as the device.
        allow_other: let other users in; None for the default of the user who mounts.
    """

    name: str
    preset: Preset
    controllers: tuple[str, ...]
    seed: int
    source: str
    allow_other: bool | None = None


def serve_host(options: HostOptions, launched: Launch) -> None:
    """Mounts and serves until a signal or an unmount.

    Raises:
        CommandError: it cannot be mounted.
    """
    serving.run(_serve, options, launched)


async def _serve(options: HostOptions, launched: Launch) -> None:
    host = Host(
        options.preset, options.name, options.controllers, options.seed, epoch_ns=time.time_ns()
    )
    host.place = launched
    processes = RecordedProcesses(best_source(), host.now_ns, host.roots.tasks, launched.frozen)
    host.process_tracking = processes.describe()
    agent = ReleaseAgent()
    host.roots.use_processes(processes)
    host.roots.release = agent.submit
    server = Server([*host_methods(host), *client_methods(host)], owner_and_root, explain)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(serving.stop_on_signal, nursery.cancel_scope)
            await nursery.start(watch.run, processes)
            await nursery.start(agent.run)
            await nursery.start(host.run)
            await nursery.start(host.clients.run)
            mount: fuse.Mount = await nursery.start(_mount, host, options, launched)
            await nursery.start(server.serve, launched.socket)
            launched.ready()
            log.info("%s is mounted on %s (pid %d)", options.name, launched.directory, os.getpid())
            await mount.ended.wait()
            nursery.cancel_scope.cancel()
    finally:
        host.close()
        processes.close()
        log.info("%s is unmounted", launched.directory)


async def _mount(
    host: Host,
    options: HostOptions,
    launched: Launch,
    *,
    task_status: trio.TaskStatus[fuse.Mount],
) -> None:
    await fuse.serve(
        host.tree,
        str(launched.directory),
        fsname=options.source,
        subtype="kvmsim",
        allow_other=options.allow_other,
        now_ns=host.now_ns,
        task_status=task_status,
    )
