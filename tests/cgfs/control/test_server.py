import logging
import os
import socket
import stat

import msgspec
import pytest
import trio

from cgfs.control.client import Client
from cgfs.control.errors import CommandError
from cgfs.control.protocol import (
    MAX_LINE_BYTES,
    Reply,
    Request,
    decode_news,
    decode_reply,
    encode_line,
    raw,
)
from cgfs.control.server import MAX_BACKLOG_BYTES, Method, Server, owner_and_root


class Word(msgspec.Struct):
    word: str


async def echo(params, peer):
    return {"word": params.word, "pid": peer.pid, "uid": peer.uid}


async def refuse(_params, _peer):
    raise CommandError("the pool is empty", os.EX_TEMPFAIL, 16)


async def lookup(_params, _peer):
    raise KeyError("x")


async def crash(_params, _peer):
    raise ZeroDivisionError


METHODS = [
    Method("echo", Word, echo),
    Method("refuse", Word, refuse),
    Method("lookup", Word, lookup),
    Method("crash", Word, crash),
]


def known_errors(error):
    return CommandError("not there") if isinstance(error, KeyError) else None


@pytest.fixture
async def path(tmp_path, nursery):
    """A socket with a server behind it."""
    server = Server(METHODS, owner_and_root, known_errors)
    await nursery.start(server.serve, tmp_path / "control.sock")
    return tmp_path / "control.sock"


async def call(path, method, params):
    def blocking():
        with Client(path, timeout_seconds=5) as client:
            return client.call(method, params, dict)

    return await trio.to_thread.run_sync(blocking)


async def failure_of(path, method, params):
    with pytest.raises(CommandError) as caught:
        await call(path, method, params)
    return caught.value


async def test_call_returns_the_result_and_the_kernel_names_the_peer(path):
    result = await call(path, "echo", Word("hello"))
    assert result == {"word": "hello", "pid": os.getpid(), "uid": os.geteuid()}


async def test_socket_is_for_its_owner_alone(path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_failure_of_a_method_reaches_the_client_as_it_was(path):
    failure = await failure_of(path, "refuse", Word("x"))
    assert (failure.message, failure.exit_code, failure.errno) == ("the pool is empty", 75, 16)


async def test_error_of_the_model_is_explained(path):
    assert (await failure_of(path, "lookup", Word("x"))).message == "not there"


async def test_bug_is_logged_and_answered_and_the_server_goes_on(path, caplog):
    with caplog.at_level(logging.CRITICAL + 1, logger="cgfs.control.server"):
        failure = await failure_of(path, "crash", Word("x"))
    assert failure.exit_code == os.EX_SOFTWARE
    assert (await call(path, "echo", Word("still here")))["word"] == "still here"


async def test_unknown_method_is_a_protocol_error(path):
    assert (await failure_of(path, "nonsense", Word("x"))).exit_code == os.EX_PROTOCOL


async def test_parameters_of_another_type_are_a_usage_error(path):
    assert (await failure_of(path, "echo", {"word": 3})).exit_code == os.EX_USAGE


async def test_requests_of_one_connection_are_answered_in_order(path):
    stream = await trio.open_unix_socket(path)
    async with stream:
        lines = [encode_line(Request(n, "echo", raw(Word(str(n))))) for n in range(3)]
        await stream.send_all(b"".join(lines))
        received = b""
        while received.count(b"\n") < 3:
            received += await stream.receive_some()
    replies = [decode_reply(line) for line in received.splitlines()]
    assert [reply.id for reply in replies] == [0, 1, 2]


async def test_connection_that_sends_an_endless_line_is_told_and_closed(path):
    stream = await trio.open_unix_socket(path)
    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(send_until_closed, stream, b"x" * (MAX_LINE_BYTES + 65536))
        received = b""
        try:
            while data := await stream.receive_some():
                received += data
        except trio.BrokenResourceError:
            pass
    assert b"longer than" in received


async def send_until_closed(stream, data):
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError:
        return


async def test_client_that_leaves_without_its_answers_ends_nothing_but_its_connection(path):
    for data in (b"x" * (MAX_LINE_BYTES + 65536), encode_line(Request(1, "echo")) * 1000):
        stream = await trio.open_unix_socket(path)
        with trio.move_on_after(0.2):
            await send_until_closed(stream, data)
        await trio.aclose_forcefully(stream)
    assert (await call(path, "echo", Word("still here")))["word"] == "still here"


async def test_stranger_is_refused(tmp_path, nursery):
    server = Server(METHODS, lambda _peer: False)
    await nursery.start(server.serve, tmp_path / "s")
    assert (await failure_of(tmp_path / "s", "echo", Word("x"))).exit_code == os.EX_NOPERM


async def test_socket_goes_with_the_server(tmp_path):
    server = Server(METHODS, owner_and_root)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, tmp_path / "s")
        nursery.cancel_scope.cancel()
    assert list(tmp_path.iterdir()) == []


def test_client_without_a_server_says_that_nobody_answers(tmp_path):
    with pytest.raises(CommandError, match="nobody answers") as caught:
        Client(tmp_path / "none.sock")
    assert caught.value.exit_code == os.EX_UNAVAILABLE


def test_client_of_a_dead_server_says_that_nobody_answers(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
    with pytest.raises(CommandError, match="nobody answers"):
        Client(tmp_path / "s")


def test_server_that_does_not_answer_is_given_up(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with (
            Client(tmp_path / "s", timeout_seconds=0.05) as client,
            pytest.raises(CommandError, match="does not answer") as caught,
        ):
            client.call("echo", Word("x"), dict)
    assert caught.value.exit_code == os.EX_TEMPFAIL


def test_reply_without_result_or_problem_is_empty():
    assert bytes(decode_reply(encode_line(Reply(1))).result) == b""


class Bell:
    """A method that keeps its connection, and rings on it."""

    def __init__(self):
        self.connections = []
        self.closed = trio.Event()

    async def attach(self, _params, connection):
        connection.notify("rung", {"times": 1})
        connection.on_close.append(self.closed.set)
        self.connections.append(connection)
        return connection.peer.pid


@pytest.fixture
async def bell(tmp_path, nursery):
    bell = Bell()
    server = Server([Method("attach", Word, bell.attach, connected=True)], owner_and_root)
    await nursery.start(server.serve, tmp_path / "bell.sock")
    bell.stream = await trio.open_unix_socket(tmp_path / "bell.sock")
    async with bell.stream:
        await bell.stream.send_all(encode_line(Request(1, "attach", raw(Word("x")))))
        yield bell


async def receive(stream, count):
    received = b""
    while received.count(b"\n") < count:
        received += await stream.receive_some()
    return [decode_news(line) for line in received.splitlines()]


async def test_notice_made_during_a_request_comes_before_its_reply(bell):
    notice, reply = await receive(bell.stream, 2)
    assert (notice.notice, bytes(notice.params)) == ("rung", b'{"times":1}')
    assert bytes(reply.result) == str(os.getpid()).encode()


async def test_notice_comes_without_a_request(bell):
    await receive(bell.stream, 2)
    bell.connections[0].notify("rung", {"times": 2})
    [notice] = await receive(bell.stream, 1)
    assert bytes(notice.params) == b'{"times":2}'


async def test_who_keeps_a_connection_hears_of_its_end(bell):
    await receive(bell.stream, 2)
    assert not bell.closed.is_set()
    await bell.stream.aclose()
    with trio.fail_after(5):
        await bell.closed.wait()


async def test_end_of_a_client_that_goes_wrong_ends_neither_the_others_nor_the_server(
    bell, caplog, tmp_path
):
    await receive(bell.stream, 2)
    bell.connections[0].on_close.append(lambda: 1 / 0)
    with caplog.at_level(logging.CRITICAL + 1, logger="cgfs.control.server"):
        await bell.stream.aclose()
        with trio.fail_after(5):
            await bell.closed.wait()
    async with await trio.open_unix_socket(tmp_path / "bell.sock") as again:
        await again.send_all(encode_line(Request(1, "attach", raw(Word("x")))))
        assert len(await receive(again, 2)) == 2


async def test_client_that_never_reads_is_cut_off(bell, caplog):
    await receive(bell.stream, 2)
    with caplog.at_level(logging.CRITICAL + 1, logger="cgfs.control.server"), trio.fail_after(5):
        while not bell.closed.is_set():
            bell.connections[0].notify("rung", "x" * (MAX_BACKLOG_BYTES // 2))
            await trio.sleep(0.01)
