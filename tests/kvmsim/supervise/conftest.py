"""A host and supervisors in one process, over a real socket."""

import os
from pathlib import Path

import pytest
import trio

from cgfs.control.server import Server, owner_and_root
from cgfs.core.tasks import RealTask
from kvmsim.builder.host import Host
from kvmsim.control.client_messages import Attach, Attached
from kvmsim.control.client_methods import client_methods
from kvmsim.control.explain import explain
from kvmsim.host.machine import Machine
from kvmsim.host.presets import parse
from kvmsim.kvm.system import System
from kvmsim.supervise.accounting import SocketAccounting
from kvmsim.supervise.connection import HostConnection
from kvmsim.supervise.keys import HostKeys

PRESET = """vendor = "amd"
[sev]
max-asid = 5
min-sev-asid = 4
[bus-lock]
exit = "fault"
"""


class KnownProcesses:
    """Real processes that do nothing, by pid: the user each belongs to."""

    def __init__(self):
        self.uids = {}

    def sync(self):
        pass

    def find(self, tid):
        uid = self.uids.get(tid)
        if uid is None:
            return None
        return RealTask(tid, tid, kthread=False, zombie=False, state="S", uid=uid, suid=uid)

    def tgids(self):
        return sorted(self.uids)

    def threads(self, tgid):
        return [tgid] if tgid in self.uids else []

    def from_caller(self, caller_tid, number):
        return number if number in self.uids else None

    def to_caller(self, caller_tid, pid):
        return pid

    def kill(self, tgid):
        self.uids.pop(tgid, None)

    def freeze(self, tgid):
        pass

    def thaw(self, tgid):
        pass

    def is_frozen(self, tgid):
        return True

    def watch(self, tgid):
        pass

    def unwatch(self, tgid):
        pass


class ServedHost:
    """A host with a control socket, used as with a shell.

    Attributes:
        host: the host.
        processes: its real processes.
        path: of the socket.
    """

    def __init__(self, path):
        self.path = path
        self.processes = KnownProcesses()
        self.host = Host(parse(PRESET, "t"), "t", processes=self.processes)
        self.scope = trio.CancelScope()
        self.write("cgroup.subtree_control", "+encryption_ids +misc +bus_lock")

    def write(self, path, text):
        self.host.files.write(f"sys/fs/cgroup/{path}", text)

    def cat(self, path):
        return self.host.files.read(f"sys/fs/cgroup/{path}")

    def mkdir(self, path):
        self.host.files.mkdir(f"sys/fs/cgroup/{path}")

    def start_process(self, pid, cgroup, uid=0):
        self.processes.uids[pid] = uid
        if cgroup:
            self.write(f"{cgroup}/cgroup.procs", str(pid))
        return pid

    async def serve(self, task_status):
        server = Server(client_methods(self.host), owner_and_root, explain)
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.host.run)
                await nursery.start(self.host.clients.run)
                await nursery.start(server.serve, self.path)
                task_status.started()
        self.host.close()


class Supervisor:
    """A supervisor's KVM without a client.

    Attributes:
        connection: to the host.
        accounting: over it.
        system: its KVM.
    """

    def __init__(self, path):
        self.connection = HostConnection.to(path)
        attached = self.connection.call("client.attach", Attach("test"), Attached)
        self.accounting = SocketAccounting(self.connection)
        self.accounting.now_ns = lambda: 7
        machine = Machine(attached.preset, None, self.accounting)
        self.system = System(machine)
        self.system.keys = HostKeys(machine, self.connection)
        self.attached = attached


async def _in_thread(call, *args):
    with trio.fail_after(10):
        return await trio.to_thread.run_sync(call, *args)


@pytest.fixture
def in_thread():
    """Makes a call that blocks until the host, which lives in the main thread, has answered."""
    return _in_thread


@pytest.fixture
def sockets(tmp_path):
    """A short directory: a socket's path has 108 bytes."""
    directory = Path(f"/tmp/kvmsim-test-{os.getpid()}")
    directory.mkdir(mode=0o700)
    yield directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


@pytest.fixture
async def served(sockets, nursery):
    served = ServedHost(sockets / "host.sock")
    for name in ("a", "b"):
        served.mkdir(name)
    await nursery.start(served.serve)
    return served


@pytest.fixture
async def supervise(served):
    """Makes supervisors."""
    made = []

    async def make():
        supervisor = await _in_thread(Supervisor, served.path)
        made.append(supervisor)
        return supervisor

    yield make
    for supervisor in made:
        supervisor.connection.close()
