"""A host inside a Python program: no mount, no socket, and time as trio's clock has it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from cgfs.control.serving import single
from cgfs.controllers import CONTROLLERS
from kvmsim.builder.host import Host
from kvmsim.host import presets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from kvmsim.host.presets import Preset


@contextlib.asynccontextmanager
async def open_host(
    preset: str | Preset = "lab-amd",
    *,
    seed: int = 0,
    controllers: Sequence[str] = tuple(CONTROLLERS),
) -> AsyncIterator[Host]:
    """A host for the time of a block; its VMs end with it.

    Under ``trio.testing.MockClock(autojump_threshold=0)`` a sleep of an hour takes no time, and the
    same seed gives the same result::

        async with kvmsim.open_host(preset="lab-amd", seed=7) as host:
            host.files.mkdir("sys/fs/cgroup/tenant")
            host.start_vm(StartVm("a", type="sev", cgroup="/tenant"))
            await trio.sleep(60)
            print(host.vm_statistics())

    Args:
        preset: the machine: a name, a file, or what ``kvmsim.host.presets`` made of one.
        seed: chance of its guests.
        controllers: cgroup controllers of its kernel.

    Raises:
        ConfigError: there is no such preset, or it cannot be used.
    """
    machine = presets.load(preset) if isinstance(preset, str) else preset
    name = preset if isinstance(preset, str) else machine.description or machine.model_name
    host = Host(machine, name, controllers, seed)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            await nursery.start(host.clients.run)
            try:
                yield host
            finally:
                host.close()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # What went wrong in the block is the block's, without a wrapping of ours.
        raise single(group) from None
