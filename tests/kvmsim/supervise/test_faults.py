"""Faults: which call strikes, and with what."""

from errno import EBUSY, EFAULT, EIO, ENOMEM

import pytest

from kvmsim.abi import ioctls, sev
from kvmsim.errors import KvmError
from kvmsim.kvm.client import LocalClient
from kvmsim.supervise.faults import Faults, parse

OP = ioctls.KVM_MEMORY_ENCRYPT_OP


def faults(*lines):
    return Faults([parse(line.split()) for line in lines])


def outcomes(made, request, calls, arg=0, client=None):
    return [made.called(None, request, arg, client or LocalClient(1)) for _ in range(calls)]


def sev_call(made, number):
    """The errno of a command, and what its error field is afterwards."""
    client = LocalClient(1)
    data = sev.KVM_SEV_CMD.pack(id=number, error=99)
    errno = made.called(None, OP, client.map(data), client)
    return errno, sev.KVM_SEV_CMD.get(data, "error")


def test_one_call_fails_and_those_around_it_do_not():
    made = faults("fail KVM_CREATE_VM 3 ENOMEM")
    assert outcomes(made, ioctls.KVM_CREATE_VM, 5) == [None, None, ENOMEM, None, None]
    assert outcomes(made, ioctls.KVM_CREATE_VCPU, 3) == [None] * 3


def test_every_call_from_one_on_fails():
    made = faults("fail KVM_RUN 2+ EIO")
    assert outcomes(made, ioctls.KVM_RUN, 4) == [None, EIO, EIO, EIO]


def test_lines_count_by_themselves_and_the_first_decides():
    made = faults("fail KVM_RUN 2 EIO", "fail KVM_RUN 2+ ENOMEM")
    assert outcomes(made, ioctls.KVM_RUN, 4) == [None, EIO, ENOMEM, ENOMEM]


def test_command_of_the_firmware_fails_with_its_error():
    made = faults("fail KVM_SEV_LAUNCH_START 2 firmware=0x0d")
    assert sev_call(made, sev.KVM_SEV_LAUNCH_START) == (None, 99)
    assert sev_call(made, sev.KVM_SEV_LAUNCH_FINISH) == (None, 99)
    assert sev_call(made, sev.KVM_SEV_LAUNCH_START) == (EIO, 13)


def test_command_can_fail_before_the_firmware_has_it():
    made = faults("fail KVM_SEV_LAUNCH_FINISH 1 ENOMEM")
    assert sev_call(made, sev.KVM_SEV_LAUNCH_FINISH) == (ENOMEM, 99)


@pytest.mark.parametrize("init", [sev.KVM_SEV_INIT, sev.KVM_SEV_ES_INIT, sev.KVM_SEV_INIT2])
def test_without_asids_every_init_is_busy(init):
    made = faults("no-asids")
    assert sev_call(made, init) == (EBUSY, 99)
    assert sev_call(made, sev.KVM_SEV_LAUNCH_START) == (None, 99)


def test_asids_run_out_later():
    made = faults("no-asids 2+")
    results = [sev_call(made, sev.KVM_SEV_INIT)[0] for _ in range(3)]
    assert results == [None, EBUSY, EBUSY]


def test_command_that_cannot_be_read_does_not_count():
    made = faults("no-asids")
    assert outcomes(made, OP, 1, arg=64) == [None]


def test_error_that_cannot_be_written_is_efault():
    class ReadOnly(LocalClient):
        def write(self, address, data):
            raise KvmError(EFAULT, "read-only")

    client = ReadOnly(1)
    arg = client.map(sev.KVM_SEV_CMD.pack(id=sev.KVM_SEV_LAUNCH_START))
    made = faults("fail KVM_SEV_LAUNCH_START 1 firmware=1")
    assert made.called(None, OP, arg, client) == EFAULT
