"""Who may call what of a supervisor's methods, and when."""

import os
from errno import EIO

import pytest

from cgfs.control.errors import CommandError
from cgfs.control.server import Peer
from kvmsim.control.client_messages import Attach, Attached, ForCaller, Process, VmReport
from kvmsim.control.client_methods import client_methods
from kvmsim.control.messages import Nothing
from kvmsim.host.presets import parse

MACHINE = Attached("t", parse('vendor = "intel"', "t"), "")


class Session:
    """Writes down what it is asked."""

    def __init__(self):
        self.calls = []

    def attached(self):
        return MACHINE

    def close(self):
        self.calls.append("close")

    async def settle(self, params):
        self.calls.append(("settle", params))

    def __getattr__(self, name):
        def call(params):
            self.calls.append((name, params))

        return call


class Connection:
    """A connection that is never told anything."""

    def __init__(self):
        self.peer = Peer(7, 0, 0)
        self.on_close = []

    def notify(self, notice, params):
        raise AssertionError(notice, params)


class ClientHost:
    """Lets everybody in."""

    def __init__(self):
        self.sessions = []

    def attach_client(self, program, peer, notify):
        self.sessions.append(Session())
        return self.sessions[-1]


@pytest.fixture
def host():
    return ClientHost()


@pytest.fixture
def call(host):
    """Calls a method by name."""
    methods = {method.name: method for method in client_methods(host)}

    async def call(connection, name, params):
        method = methods[name]
        assert method.connected
        assert isinstance(params, method.params)
        return await method.call(params, connection)

    return call


async def test_attached_supervisor_gets_the_machine_and_its_own_session(host, call):
    first, second = Connection(), Connection()
    assert await call(first, "client.attach", Attach("x")) == MACHINE
    await call(second, "client.attach", Attach("y"))
    assert await call(second, "client.report", VmReport()) == Nothing()
    assert [session.calls for session in host.sessions] == [[], [("report", VmReport())]]


async def test_end_of_a_connection_ends_its_session(host, call):
    connection = Connection()
    await call(connection, "client.attach", Attach("x"))
    for closing in connection.on_close:
        closing()
    assert host.sessions[0].calls == ["close"]


async def test_before_attaching_nothing_can_be_asked(call):
    with pytest.raises(CommandError, match=r"^not attached$") as caught:
        await call(Connection(), "client.follow", Process(1))
    assert (caught.value.exit_code, caught.value.errno) == (os.EX_PROTOCOL, EIO)


async def test_nobody_attaches_twice(host, call):
    connection = Connection()
    await call(connection, "client.attach", Attach("x"))
    with pytest.raises(CommandError, match=r"^attached already$"):
        await call(connection, "client.attach", Attach("x"))
    assert len(host.sessions) == 1


@pytest.mark.parametrize("name", ["take_key", "charge"])
async def test_others_may_give_back_before_anything_is_charged(host, call, name):
    connection, params = Connection(), ForCaller(1, "sev")
    await call(connection, "client.attach", Attach("x"))
    await call(connection, f"client.{name}", params)
    assert host.sessions[0].calls == [("settle", params), (name, params)]
