"""The process behind ``cgfs mount``: one hierarchy, real processes, fixed capacities."""

import time
from collections.abc import Callable
from typing import Protocol, cast

import trio

from cgfs.cli.mount_options import MountOptions
from cgfs.control import serving
from cgfs.control.errors import from_errno
from cgfs.control.launch import Launch
from cgfs.controllers import CONTROLLERS
from cgfs.controllers.misc import Misc
from cgfs.core.cgroup import Cgroup
from cgfs.core.roots import Roots
from cgfs.errors import CgroupError
from cgfs.fuse.mount import Mount, serve
from cgfs.procs import watch
from cgfs.procs.choose import best_source
from cgfs.procs.record import RecordedProcesses
from cgfs.procs.release_agent import ReleaseAgent
from cgfs.views.tree import Tree

# Which controllers count a resource; every other one is misc's alone.
COUNTED_BY = {"sev": ("encryption_ids", "misc"), "sev_es": ("encryption_ids", "misc")}


class Counting(Protocol):
    """A controller with capacities."""

    def set_capacity(self, resource: str, amount: int) -> None:
        """Says how many units of a resource there are."""


def serve_tree(options: MountOptions, source: str, launched: Launch) -> None:
    """Mounts and serves until a signal or an unmount.

    Raises:
        CommandError: it cannot be mounted.
    """
    try:
        roots = Roots([CONTROLLERS[name] for name in options.controllers])
        set_capacities(roots, options.capacities)
        top = hierarchy_root(roots, options)
    except CgroupError as error:
        raise from_errno(f"mount options: {error}", error.errno) from error
    serving.run(_serve, roots, top, options, source, launched)


def set_capacities(roots: Roots, capacities: dict[str, int]) -> None:
    """Registers fixed capacities with every controller that counts the resource."""
    misc = roots.controllers.get("misc")
    for resource, amount in capacities.items():
        if isinstance(misc, Misc):
            misc.add_resource(resource)
        for name in COUNTED_BY.get(resource, ("misc",)):
            if name in roots.controllers:
                cast("Counting", roots.controller(name)).set_capacity(resource, amount)


def hierarchy_root(roots: Roots, options: MountOptions) -> Cgroup:
    """The root cgroup that the mount shows."""
    if options.version == 2:
        return roots.v2.root
    hierarchy = roots.mount_v1(options.controllers, options.name)
    hierarchy.release_agent = options.release_agent
    hierarchy.root.clone_children = options.clone_children
    return hierarchy.root


async def _serve(
    roots: Roots, top: Cgroup, options: MountOptions, source: str, launched: Launch
) -> None:
    # The model's time begins with the mount, which is when the root and its files appeared.
    epoch_ns = time.time_ns()

    def now_ns() -> int:
        return time.time_ns() - epoch_ns

    tree = Tree(roots, top, epoch_ns)
    processes = RecordedProcesses(best_source(), now_ns, roots.tasks, launched.frozen)
    agent = ReleaseAgent()
    roots.use_processes(processes)
    roots.release = agent.submit
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(serving.stop_on_signal, nursery.cancel_scope)
            await nursery.start(watch.run, processes)
            await nursery.start(agent.run)
            mount: Mount = await nursery.start(_mount, tree, now_ns, source, options, launched)
            launched.ready()
            await mount.ended.wait()
            nursery.cancel_scope.cancel()
    finally:
        processes.close()


async def _mount(
    tree: Tree,
    now_ns: Callable[[], int],
    source: str,
    options: MountOptions,
    launched: Launch,
    *,
    task_status: trio.TaskStatus[Mount],
) -> None:
    await serve(
        tree,
        str(launched.directory),
        fsname=source,
        subtype="cgfs",
        allow_other=options.allow_other or None,
        over=options.nonempty,
        now_ns=now_ns,
        task_status=task_status,
    )
