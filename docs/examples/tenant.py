"""A tenant with one SEV ASID and a hundred bus locks a second: a minute of it, in no time.

Run it with ``python docs/examples/tenant.py``; the same seed prints the same every time.
"""

import trio
from trio.testing import MockClock

import kvmsim
from kvmsim.control.messages import StartVm
from kvmsim.errors import KvmError

TREE = "sys/fs/cgroup"


async def main() -> None:
    """Starts a host, a guest too many, and a guest that takes too many bus locks."""
    async with kvmsim.open_host("lab-amd", seed=7) as host:
        files = host.files
        files.write(f"{TREE}/cgroup.subtree_control", "+misc +bus_lock")
        files.mkdir(f"{TREE}/tenant")
        files.write(f"{TREE}/tenant/misc.max", "sev 1")
        files.write(f"{TREE}/tenant/bus_lock.max", "100 1000000")

        noisy = StartVm("a", type="sev", cgroup="/tenant", guest="buslock rate=5000")
        host.start_vm(noisy)
        try:
            host.start_vm(StartVm("b", type="sev", cgroup="/tenant"))
        except KvmError as error:
            print(f"refused: {error.__cause__ or error}")

        await trio.sleep(60)
        print(files.read(f"{TREE}/tenant/bus_lock.stat"), end="")
        print(files.read(f"{TREE}/tenant/misc.events"), end="")


if __name__ == "__main__":
    trio.run(main, clock=MockClock(autojump_threshold=0))
