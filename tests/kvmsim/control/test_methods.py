import errno
import os

import msgspec
import pytest

from cgfs.control.errors import CommandError
from cgfs.control.server import Peer
from cgfs.errors import ChargeRefused
from kvmsim.control.messages import LbrState, NamedVm, Nothing, StartVm, VmSnapshot
from kvmsim.control.methods import host_methods

PEER = Peer(pid=77, uid=0, gid=0)


def snapshot(name):
    values = {field.name: 0 for field in msgspec.structs.fields(VmSnapshot)}
    return VmSnapshot(**values | {"name": name, "vcpus": []})


class FakeHost:
    """A host with one VM that refuses every other."""

    def __init__(self):
        self.callers = []

    def statistics(self):
        return "statistics"

    def set_lbr(self, state):
        self.lbr = state
        return state

    def vm_statistics(self):
        return [snapshot("a")]

    async def settle(self):
        self.callers.append("settled")

    def start_vm(self, request, caller_pid):
        self.callers.append(caller_pid)
        if request.name != "a":
            raise ChargeRefused("sev", "/tenant", "misc.max", "sev 2")
        return snapshot(request.name)

    def stop_vm(self, name):
        raise KeyError(name)


@pytest.fixture
def host():
    return FakeHost()


async def call(host, name, params):
    [method] = [method for method in host_methods(host) if method.name == name]
    assert isinstance(params, method.params)
    return await method.call(params, PEER)


async def test_info_and_list_are_snapshots(host):
    assert await call(host, "host.info", Nothing()) == "statistics"
    assert await call(host, "vm.list", Nothing()) == [snapshot("a")]


async def test_show_finds_a_vm_by_name(host):
    assert await call(host, "vm.show", NamedVm("a")) == snapshot("a")
    with pytest.raises(CommandError, match=r"^vm b: no such VM$"):
        await call(host, "vm.show", NamedVm("b"))


async def test_start_names_the_process_that_asks(host):
    assert await call(host, "vm.start", StartVm("a")) == snapshot("a")
    assert host.callers == ["settled", 77]


async def test_refused_start_is_one_line_about_that_vm(host):
    with pytest.raises(CommandError) as caught:
        await call(host, "vm.start", StartVm("c", type="sev"))
    failure = caught.value
    line = 'vm c: no SEV ASID: cgroup /tenant is at misc.max "sev 2" (EBUSY)'
    assert (failure.message, failure.exit_code) == (line, os.EX_TEMPFAIL)
    assert failure.errno == errno.EBUSY


async def test_bug_of_the_host_is_not_dressed_up(host):
    with pytest.raises(KeyError):
        await call(host, "vm.stop", NamedVm("a"))


@pytest.mark.parametrize("field", ["vcpus", "bus_lock_ratelimit"])
def test_start_request_with_a_number_that_makes_no_sense_is_not_decoded(field):
    request = {"name": "a", field: -1}
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.json.decode(msgspec.json.encode(request), type=StartVm)


def test_vm_without_vcpus_is_not_decoded():
    with pytest.raises(msgspec.ValidationError, match="vcpus"):
        msgspec.json.decode(b'{"name": "a", "vcpus": 0}', type=StartVm)


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", "a\x7f"])
def test_start_refuses_a_name_that_breaks_lines_or_paths(name):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": name}, StartVm)


async def test_records_are_taken_and_given_back(host):
    assert await call(host, "host.lbr", LbrState(taken=True)) == LbrState(taken=True)
    assert host.lbr == LbrState(taken=True)
