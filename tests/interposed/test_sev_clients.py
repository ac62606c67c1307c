import pytest

from cgfs.controllers.misc import CONTROLLER as MISC
from cgfs.core.roots import Roots
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import load
from kvmsim.interpose import Emulated, run
from kvmsim.kvm.devsev import SevFile
from kvmsim.kvm.system import System


@pytest.fixture
def sev_host(trapping):
    """A machine with SEV-ES and /dev/sev; afterwards nothing is held."""
    del trapping
    roots = Roots([MISC])
    system = System(Machine(load("milan509-es99"), roots, CgroupAccounting(roots)))
    yield Emulated(system, devices={"sev": SevFile(system)})
    statistics = system.statistics()
    assert (statistics.vms, statistics.asids.sev_es) == (0, 0)
    assert roots.v2.root.css["misc"].account("sev_es").usage == 0
    assert system.firmware.guests == {}


@pytest.mark.parametrize("flags", [(), ("-static",)], ids=["dynamic", "static"])
def test_guest_is_launched_mirrored_and_moved_to_another_process(sev_host, compiled, capfd, flags):
    status = run([str(compiled("sev", *flags))], sev_host)
    assert (capfd.readouterr().out, status) == ("", 0)
