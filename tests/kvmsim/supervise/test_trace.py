"""Traces: one object per call, in the words of the ABI."""

import io
import json
from errno import ENOSPC, ENOTTY
from types import SimpleNamespace

import pytest

from kvmsim.abi import caps, ioctls, sev, structs
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import parse
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.page import KvmRun
from kvmsim.kvm.system import System
from kvmsim.supervise import decode
from kvmsim.supervise.trace import Trace


class Caller(LocalClient):
    """A client's thread 8 of process 7."""

    def __init__(self):
        super().__init__(7)
        self.thread = SimpleNamespace(number=8)


@pytest.fixture
def caller():
    return Caller()


@pytest.fixture
def output():
    return io.BytesIO()


@pytest.fixture
def trace(output):
    times = iter(range(0, 10_000, 100))
    return Trace(output, lambda: next(times))


@pytest.fixture
def system():
    from cgfs.core.roots import Roots

    roots = Roots([])
    return System(Machine(parse('vendor = "intel"', "t"), roots, CgroupAccounting(roots)))


def lines(output):
    return [json.loads(line) for line in output.getvalue().splitlines()]


def traced(trace, file, request, arg, caller, result):
    trace.called(file, request, arg, caller)
    trace.returned(file, request, arg, caller, result, 0)


def test_call_with_a_number(trace, output, system, caller):
    traced(trace, system, ioctls.KVM_CREATE_VM, 0, caller, 5)
    assert lines(output) == [
        {
            "time_ns": 100,
            "pid": 7,
            "tid": 8,
            "file": "system",
            "call": "KVM_CREATE_VM",
            "arg": 0,
            "result": 5,
            "errno": None,
            "took_ns": 100,
        }
    ]


def test_failed_call_names_its_errno(trace, output, system, caller):
    traced(trace, system.create_vm(), 0xDEAD, 0x1234, caller, -ENOTTY)
    [line] = lines(output)
    assert (line["call"], line["arg"], line["file"]) == ("0xdead", 0x1234, "vm")
    assert (line["result"], line["errno"]) == (-1, "ENOTTY")


def test_structure_is_shown_by_its_members(trace, output, system, caller):
    data = structs.KVM_ENABLE_CAP.pack(cap=caps.KVM_CAP_X86_BUS_LOCK_EXIT, args=2)
    traced(trace, system.create_vm(), ioctls.KVM_ENABLE_CAP, caller.map(data), caller, 0)
    [line] = lines(output)
    assert line["arg"] == {
        "cap": 193,
        "flags": 0,
        "args": [2, 0, 0, 0],
        "name": "KVM_CAP_X86_BUS_LOCK_EXIT",
    }
    assert "out" not in line


def test_what_kvm_wrote_is_shown_beside_what_it_was_given(trace, output, system, caller):
    vcpu = system.create_vm().create_vcpu(0)
    data = structs.KVM_REGS.pack()
    arg = caller.map(data)
    trace.called(vcpu, ioctls.KVM_GET_REGS, arg, caller)
    structs.KVM_REGS.put(data, "rip", 0xFFF0)
    trace.returned(vcpu, ioctls.KVM_GET_REGS, arg, caller, 0, 0)
    [line] = lines(output)
    assert (line["arg"]["rip"], line["out"]["rip"]) == (0, 0xFFF0)


def test_bad_pointer_is_shown_as_an_address(trace, output, system, caller):
    traced(trace, system.create_vm(), ioctls.KVM_ENABLE_CAP, 64, caller, -14)
    assert lines(output)[0]["arg"] == {"address": 64}


def test_table_is_shown_with_its_entries(caller):
    data = structs.KVM_MSRS.pack(nmsrs=2)
    for index in (0x10, 0x1D9):
        data += structs.KVM_MSR_ENTRY.pack(index=index, data=index + 1)
    shown = decode.argument(ioctls.KVM_SET_MSRS, caller.map(data), caller)
    assert shown["nmsrs"] == 2
    assert shown["entries"] == [{"index": 0x10, "data": 0x11}, {"index": 0x1D9, "data": 0x1DA}]


def test_table_that_claims_to_be_endless_is_cut(caller):
    data = structs.KVM_MSRS.pack(nmsrs=2**32 - 1) + bytes(16 * decode.MAX_ENTRIES)
    shown = decode.argument(ioctls.KVM_SET_MSRS, caller.map(data), caller)
    assert len(shown["entries"]) == decode.MAX_ENTRIES


def test_sev_command_is_shown_with_its_parameters(caller):
    init = sev.KVM_SEV_INIT_STRUCT.pack(vmsa_features=32)
    data = sev.KVM_SEV_CMD.pack(id=sev.KVM_SEV_INIT2, data=caller.map(init))
    shown = decode.argument(ioctls.KVM_MEMORY_ENCRYPT_OP, caller.map(data), caller)
    assert shown["command"] == "KVM_SEV_INIT2"
    assert shown["parameters"]["vmsa_features"] == 32


def test_sev_command_with_a_bad_pointer_is_shown_without(caller):
    data = sev.KVM_SEV_CMD.pack(id=sev.KVM_SEV_INIT2, data=64)
    shown = decode.argument(ioctls.KVM_MEMORY_ENCRYPT_OP, caller.map(data), caller)
    assert (shown["command"], shown["parameters"]) == ("KVM_SEV_INIT2", None)


def test_capability_that_is_asked_for_has_its_name(caller):
    shown = decode.argument(ioctls.KVM_CHECK_EXTENSION, caps.KVM_CAP_MAX_VCPUS, caller)
    assert shown == {"cap": 66, "name": "KVM_CAP_MAX_VCPUS"}


def test_run_is_shown_with_its_exit_however_many_others_are_made_meanwhile(
    trace, output, system, caller
):
    vm = system.create_vm()
    first, second = vm.create_vcpu(0), vm.create_vcpu(1)
    for vcpu in (first, second):
        trace.called(vcpu, ioctls.KVM_RUN, 0, caller)
    traced(trace, system, ioctls.KVM_GET_API_VERSION, 0, caller, 12)
    first.run.u32[2] = 33
    trace.returned(first, ioctls.KVM_RUN, 0, caller, 0, 0)
    trace.returned(second, ioctls.KVM_RUN, 0, caller, -4, 0)
    shown = [(line["call"], line.get("exit"), line["errno"]) for line in lines(output)]
    assert shown == [
        ("KVM_GET_API_VERSION", None, None),
        ("KVM_RUN", {"reason": "X86_BUS_LOCK"}, None),
        ("KVM_RUN", None, "EINTR"),
    ]


def test_full_disk_ends_the_trace_and_nothing_else(system, caller, caplog):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(ENOSPC, "No space left on device")

    trace = Trace(Full(), lambda: 0)
    for _ in range(3):
        traced(trace, system, ioctls.KVM_GET_API_VERSION, 0, caller, 12)
    assert caplog.messages == ["the trace ends here: No space left on device"]


def test_exits_with_data_show_it():
    page = KvmRun()
    page.u32[2] = 2
    page.memory[32:40] = bytes([1, 1, 0xF8, 3, 2, 0, 0, 0])
    page.io_data(b"hi")
    assert decode.run_exit(page) == {
        "reason": "IO",
        "port": 0x3F8,
        "size": 1,
        "count": 2,
        "data": "6869",
    }


def test_sev_command_without_parameters_has_its_name(caller):
    data = sev.KVM_SEV_CMD.pack(id=sev.KVM_SEV_LAUNCH_FINISH)
    shown = decode.argument(ioctls.KVM_MEMORY_ENCRYPT_OP, caller.map(data), caller)
    assert shown["command"] == "KVM_SEV_LAUNCH_FINISH"
    assert "parameters" not in shown
