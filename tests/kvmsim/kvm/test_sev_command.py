from errno import EBUSY, EIO, ENODEV, ETIMEDOUT

import pytest

from kvmsim.abi import sev as abi
from kvmsim.abi.psp import SEV_ISSUE_CMD, SEV_ISSUE_CMD_STRUCT, Status
from kvmsim.errors import KvmError
from kvmsim.kvm.devsev import SevFile
from kvmsim.sev.errors import FirmwareError

UNTOUCHED = 77


def fail(vmm, command, error):
    """Have the firmware refuse one command from now on."""

    def before(name):
        if name == command:
            raise error

    vmm.system.firmware.before = before


def test_failed_init_returns_the_asid_and_can_be_tried_again(vmm, accounting):
    reset = SEV_ISSUE_CMD_STRUCT.pack(cmd=0)
    SevFile(vmm.system, writable=True).ioctl(SEV_ISSUE_CMD, reset)
    fail(vmm, "INIT", FirmwareError(Status.HWERROR_PLATFORM))
    vm = vmm.create(2)
    outcome = vmm.run(vm, abi.KVM_SEV_INIT2, abi.KVM_SEV_INIT_STRUCT)
    assert outcome.answer == (EIO, 19)
    assert accounting.charged == {"sev": 0}
    assert (vm.key, vm.sev_active, vm.needs_init) == (None, False, True)
    vmm.system.firmware.before = None
    assert vmm.run(vm, abi.KVM_SEV_INIT2, abi.KVM_SEV_INIT_STRUCT).answer == (0, 0)
    assert vm.key.asid == 6  # the first one waits for a flush


@pytest.mark.parametrize("errno", [ENODEV, EBUSY, ETIMEDOUT])
def test_driver_that_cannot_reach_the_firmware_leaves_error_alone(vmm, errno):
    vm = vmm.started()
    fail(vmm, "GUEST_STATUS", KvmError(errno))
    assert vmm.status(vm).answer == (errno, UNTOUCHED)


@pytest.mark.parametrize("status", [Status.RESOURCE_LIMIT, Status.HWERROR_UNSAFE])
def test_injected_status_is_eio_with_that_error(vmm, status):
    fail(vmm, "LAUNCH_START", FirmwareError(status))
    vm = vmm.guest()
    assert vmm.start(vm).answer == (EIO, status)
    vmm.system.firmware.before = None
    assert vmm.start(vm).answer == (0, 0)


def test_failed_activation_forgets_the_handle(vmm):
    fail(vmm, "ACTIVATE", FirmwareError(Status.RESOURCE_LIMIT))
    assert vmm.start(vmm.guest()).answer == (EIO, Status.RESOURCE_LIMIT)
    assert vmm.system.firmware.guests == {}


def test_firmware_that_does_not_flush_recycles_nothing(vmm, accounting):
    for _ in range(5):
        vmm.running().close()
    fail(vmm, "DF_FLUSH", FirmwareError(Status.HWERROR_PLATFORM))
    vm = vmm.create(2)
    assert vmm.run(vm, abi.KVM_SEV_INIT2, abi.KVM_SEV_INIT_STRUCT).errno == EBUSY
    assert accounting.charged == {"sev": 0}


@pytest.mark.parametrize("command", ["DEACTIVATE", "DECOMMISSION"])
def test_firmware_that_does_not_let_go_does_not_keep_the_charge(vmm, accounting, command):
    vm = vmm.running()
    fail(vmm, command, FirmwareError(Status.HWERROR_PLATFORM))
    vm.close()
    assert accounting.charged == {"sev": 0}
    assert len(vmm.system.firmware.guests) == 1


def test_failed_snp_launch_leaves_no_context(vmm):
    vm = vmm.guest(4)
    layout = abi.KVM_SEV_SNP_LAUNCH_START_STRUCT
    fail(vmm, "SNP_ACTIVATE", FirmwareError(Status.RESOURCE_LIMIT))
    assert vmm.run(vm, 100, layout, policy=3 << 16).answer == (EIO, Status.RESOURCE_LIMIT)
    assert vmm.system.firmware.snp.guests == []
    vmm.system.firmware.before = None
    assert vmm.run(vm, 100, layout, policy=3 << 16).answer == (0, 0)
