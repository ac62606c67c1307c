"""The supervisor's end of the socket, against a host made of bytes."""

import socket
import threading
from errno import EIO, ENOENT

import pytest

from kvmsim.control.messages import Nothing
from kvmsim.errors import KvmError
from kvmsim.supervise.connection import HostConnection


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with theirs:
        connection = HostConnection(ours, patience_s=1)
        yield connection, theirs
        connection.close()


def answering(theirs, data):
    """A host that answers the next request with some bytes; None hangs up."""

    def serve():
        theirs.recv(65536)
        if data is None:
            theirs.shutdown(socket.SHUT_RDWR)
        else:
            theirs.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def refusal(connection, method="x"):
    with pytest.raises(KvmError) as caught:
        connection.call(method, Nothing(), int)
    return caught.value


def test_notices_around_a_reply_are_kept_for_later(pair):
    connection, theirs = pair
    heard = []
    connection.handle("a", heard.append)
    host = answering(
        theirs, b'{"notice":"a","params":{"n":1}}\n{"id":1,"result":7}\n{"notice":"a"}\n'
    )
    assert connection.call("x", Nothing(), int) == 7
    host.join()
    assert heard == []
    connection.deliver()
    assert heard == [b'{"n":1}', b"{}"]


def test_notice_can_be_taken_before_it_is_delivered(pair):
    connection, theirs = pair
    heard = []
    connection.handle("a", heard.append)
    theirs.sendall(b'{"notice":"a","params":{"n":1}}\n{"notice":"a","params":{"n":2}}\n')
    host = answering(theirs, b'{"id":1,"result":0}\n')
    connection.call("x", Nothing(), int)
    host.join()
    assert connection.take("a", b'{"n":2}')
    assert not connection.take("a", b'{"n":2}')
    connection.deliver()
    assert heard == [b'{"n":1}']


def test_reply_to_something_said_earlier_is_not_the_answer(pair):
    connection, theirs = pair
    connection.post("y", Nothing())
    host = answering(theirs, b'{"id":0,"result":5}\n{"id":1,"result":6}\n')
    assert connection.call("x", Nothing(), int) == 6
    host.join()


def test_refusal_has_the_hosts_errno_and_words(pair):
    connection, theirs = pair
    problem = b'{"message":"no such thing (ENOENT)","exit_code":69,"errno":2}'
    host = answering(theirs, b'{"id":1,"problem":' + problem + b"}\n")
    error = refusal(connection)
    host.join()
    assert (error.errno, str(error)) == (ENOENT, "no such thing (ENOENT)")


def test_bug_of_the_host_is_eio(pair):
    connection, theirs = pair
    host = answering(theirs, b'{"id":1,"problem":{"message":"internal error","exit_code":70}}\n')
    assert refusal(connection).errno == EIO
    host.join()
    assert not connection.lost


@pytest.mark.parametrize("data", [None, b"nonsense\n", b'{"id":1,"result":'])
def test_host_that_hangs_up_or_talks_nonsense_or_stalls_is_lost(pair, data):
    connection, theirs = pair
    lost = []
    connection.on_lost.append(lambda: lost.append(True))
    host = answering(theirs, data)
    assert refusal(connection).errno == EIO
    host.join()
    assert connection.lost
    assert lost == []  # not from inside a call
    connection.poll()
    connection.poll()
    assert lost == [True]
    assert refusal(connection).errno == EIO
    connection.post("y", Nothing())


def test_host_that_takes_too_long_is_told_that_it_is_given_up(pair):
    connection, theirs = pair
    assert refusal(connection).errno == EIO
    theirs.settimeout(5)
    while theirs.recv(65536):
        pass  # the request, then the end
