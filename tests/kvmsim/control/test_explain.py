import errno
import os

import pytest

from cgfs.core.roots import Roots
from cgfs.errors import CgroupError, ChargeRefused
from kvmsim.abi.caps import KVM_X86_TDX_VM
from kvmsim.control.explain import explain
from kvmsim.errors import ConfigError, KvmError, KvmsimError
from kvmsim.host import presets
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.kvm.system import System


def told(error):
    failure = explain(error)
    assert failure is not None
    return failure.message, failure.exit_code


def test_refused_charge_names_cgroup_file_and_value():
    refused = ChargeRefused("sev", "/tenant", "misc.max", "sev 2")
    line = 'no SEV ASID: cgroup /tenant is at misc.max "sev 2" (EBUSY)'
    assert told(refused) == (line, os.EX_TEMPFAIL)


def test_exhausted_machine_is_told_as_the_host():
    refused = ChargeRefused("sev_es", "/", "misc.capacity", "sev_es 5")
    line = 'no SEV-ES ASID: the host is at misc.capacity "sev_es 5" (EBUSY)'
    assert told(refused) == (line, os.EX_TEMPFAIL)


def test_cgroup_that_takes_no_processes_is_no_failure_that_may_pass():
    assert told(CgroupError(errno.EBUSY, "cgroup /a takes no processes")) == (
        "cgroup /a takes no processes (EBUSY)",
        os.EX_UNAVAILABLE,
    )


def test_resource_of_a_preset_is_called_by_its_name():
    assert told(ChargeRefused("epc", "/t", "misc.max", "epc 1"))[0].startswith("no epc: ")


def test_ioctl_that_passes_a_refusal_on_is_told_as_the_refusal():
    error = KvmError(errno.EBUSY, "KVM_SEV_INIT")
    error.__cause__ = ChargeRefused("sev", "/tenant", "misc.max", "sev 2")
    assert "misc.max" in told(error)[0]


def test_ioctl_of_its_own_keeps_its_words():
    assert told(KvmError(errno.EINVAL, "KVM_CREATE_VM: type 5")) == (
        "KVM_CREATE_VM: type 5 (EINVAL)",
        os.EX_USAGE,
    )


def test_exhausted_tdx_keys_are_a_failure_that_may_pass():
    tdx = presets.parse('vendor = "intel"\n[tdx]\nkeys = 1\n', "t.toml")
    roots = Roots([])
    system = System(Machine(tdx, roots, CgroupAccounting(roots)))
    system.create_vm(KVM_X86_TDX_VM).encrypt()
    with pytest.raises(KvmError) as caught:
        system.create_vm(KVM_X86_TDX_VM).encrypt()
    line = "no TDX key: all of the host's are in use (ENOSPC)"
    assert told(caught.value) == (line, os.EX_TEMPFAIL)


def test_missing_cgroup_is_unavailable():
    error = CgroupError(errno.ENOENT, "cgroup /x does not exist")
    assert told(error) == ("cgroup /x does not exist (ENOENT)", os.EX_UNAVAILABLE)


def test_bad_preset_is_a_configuration_error():
    assert told(ConfigError("x.toml: broken")) == ("x.toml: broken", os.EX_CONFIG)


def test_other_error_of_ours_is_a_software_error():
    assert told(KvmsimError("odd")) == ("odd", os.EX_SOFTWARE)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), None])
def test_what_nobody_raised_on_purpose_is_not_explained(error):
    assert explain(error) is None
