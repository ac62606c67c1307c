"""Machine code: put into memory, and put together."""

import ctypes

import pytest

from kvmsim.engine.x86 import machine_code
from kvmsim.engine.x86.machine_code import EQUAL, Jump, Label, assemble

# (number: rdi) -> 7 where it is 0, else 1 + 2 + ... + number.
SUM = (
    b"\x31\xc0",  # xor eax, eax
    b"\x48\x85\xff",  # test rdi, rdi
    Jump("none", EQUAL),
    Label("again"),
    b"\x01\xf8\x48\xff\xcf",  # add eax, edi; dec rdi
    Jump("done", EQUAL),
    Jump("again"),
    Label("none"),
    b"\xb8\x07\x00\x00\x00",  # mov eax, 7
    Label("done"),
    b"\xc3",
)


@pytest.fixture
def code():
    made = machine_code.new()
    if made is None:
        pytest.skip("needs an x86-64 host with executable memory")
    return made


@pytest.mark.parametrize(("number", "found"), [(0, 7), (1, 1), (10, 55)])
def test_jumps_lead_to_their_labels(code, number, found):
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)(code.place(assemble(*SUM)))
    assert function(number) == found


def test_functions_stay_where_they_were_put_when_more_come(code):
    type_ = ctypes.CFUNCTYPE(ctypes.c_int)
    body = b"\xb8%s\xc3" + b"\x90" * 1000
    places = [code.place(body % n.to_bytes(4, "little")) for n in range(200)]
    assert [type_(place)() for place in places] == list(range(200))


def test_other_hosts_have_none(monkeypatch):
    monkeypatch.setattr(machine_code.platform, "machine", lambda: "riscv64")
    assert machine_code.new() is None


def test_host_that_refuses_executable_memory_has_none(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError

    monkeypatch.setattr(machine_code.mmap, "mmap", refuse)
    assert machine_code.new() is None
