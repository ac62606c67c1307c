"""Real programs under the filter: compiled here, run against a host in this process."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from cgfs.controllers.misc import CONTROLLER as MISC
from cgfs.core.roots import Roots
from kvmsim.engine.base import Hlt, Io
from kvmsim.engine.scripted import Scripted
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import load
from kvmsim.interpose import Emulated, Unavailable, run
from kvmsim.kvm.devsev import SevFile
from kvmsim.kvm.system import System

SOURCES = Path(__file__).parent / "clients"


@dataclass
class Host:
    """An emulated host, and a way to run programs on it."""

    roots: Roots
    system: System
    emulated: Emulated

    def run(self, *argv, **options):
        return run([str(arg) for arg in argv], self.emulated, **options)

    def limit_asids(self, number):
        self.roots.controller("misc").set_capacity("sev", number)

    def assert_nothing_left(self):
        statistics = self.system.statistics()
        asids = statistics.asids
        assert (statistics.vms, statistics.vcpus, asids.sev, asids.sev_es) == (0, 0, 0, 0)
        for resource in self.system.machine.capacities:
            assert self.roots.v2.root.css["misc"].account(resource).usage == 0


@pytest.fixture(scope="session")
def trapping():
    host = emulated_host()
    try:
        host.run("true")
    except Unavailable as reason:
        pytest.skip(f"no client can be run here: {reason}")


def emulated_host(preset="naples15", stops=()):
    roots = Roots([MISC])
    system = System(Machine(load(preset), roots, CgroupAccounting(roots)))
    return Host(
        roots,
        system,
        Emulated(
            system,
            devices={"sev": SevFile(system)},
            engine=lambda _: Scripted(list(stops)),
        ),
    )


@pytest.fixture
def make_host(trapping):
    """Make a host of a preset, whose guests stop as given."""
    del trapping
    return emulated_host


@pytest.fixture
def host(trapping):
    """Guests write "hi" to a serial port, then halt for ever."""
    del trapping
    made = emulated_host(stops=[Io(port=0x3F8, size=1, data=b"hi"), Hlt()])
    yield made
    made.assert_nothing_left()


@pytest.fixture
def halted(trapping):
    """Guests halt for ever."""
    del trapping
    made = emulated_host()
    yield made
    made.assert_nothing_left()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Compile a client: ``compiled("calls", "-static")`` is the program's path."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("no gcc to compile the client programs with")
    directory = tmp_path_factory.mktemp("clients")

    def build(name, *flags):
        program = directory / "".join((name, *flags))
        if not program.exists():
            source = SOURCES / f"{name}.c"
            command = [gcc, "-O1", "-Wall", "-o", program, source, *flags, "-lpthread"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{name}.c cannot be compiled here: {done.stderr[:200]}")
        return program

    return build
