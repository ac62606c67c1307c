"""Guest memory of a real client, by each of the ways to get hold of it."""

from dataclasses import replace

import pytest

from kvmsim.abi.ioctls import KVM_GET_API_VERSION, KVM_SET_USER_MEMORY_REGION
from kvmsim.interpose import run

MIB = 1 << 20


class Engine:
    """Takes the memory of the client's slot, as a guest engine would."""

    def __init__(self):
        self.supervisor = None
        self.memory = None
        self.seen = {}

    async def beside(self, supervisor):
        self.supervisor = supervisor

    def called(self, file, request, arg, caller):
        if request == KVM_GET_API_VERSION:
            self.seen["last"] = self.memory.read(2 * MIB, 9)
            self.seen["first"] = self.memory.read(0, 1)

    def returned(self, file, request, arg, caller, result, now_ns):
        if request != KVM_SET_USER_MEMORY_REGION:
            return
        region = caller.read(arg, 32)
        address = int.from_bytes(region[24:32], "little")
        self.memory = self.supervisor.memory_of_caller(address, 4 * MIB)
        self.seen["before"] = self.memory.read(3 * 4096, 15)
        self.memory.write(MIB, b"from the supervisor\0")


@pytest.fixture
def engine():
    made = Engine()
    yield made
    if made.memory is not None:
        made.memory.close()


@pytest.mark.parametrize(
    ("kind", "how"), [("memfd", "shared"), ("shared", "shared"), ("anonymous", "remapped")]
)
def test_pages_of_a_client_are_the_supervisors_too(halted, compiled, capfd, engine, kind, how):
    emulated = replace(halted.emulated, tap=engine, beside=engine.beside)
    status = run([str(compiled("memory")), kind], emulated)
    assert (capfd.readouterr().out, status) == ("", 0)
    assert engine.seen == {"before": b"from the client", "last": b"once more", "first": b"\x77"}
    assert engine.memory.how == how
    assert engine.memory.view is not None


def test_memory_of_a_client_that_is_traced_is_copied(halted, compiled, capfd, engine, monkeypatch):
    def traced(_number):
        raise PermissionError(1, "traced by somebody else")

    monkeypatch.setattr("kvmsim.interpose.remap.Tracee", traced)
    emulated = replace(halted.emulated, tap=engine, beside=engine.beside)
    status = run([str(compiled("memory")), "anonymous"], emulated)
    assert (capfd.readouterr().out, status) == ("", 0)
    assert engine.seen == {"before": b"from the client", "last": b"once more", "first": b"\x77"}
    assert (engine.memory.how, engine.memory.view) == ("copied", None)
