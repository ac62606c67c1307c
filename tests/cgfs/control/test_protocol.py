import os

import msgspec
import pytest

from cgfs.control.errors import CommandError
from cgfs.control.protocol import (
    LineBuffer,
    LineTooLongError,
    Problem,
    Reply,
    Request,
    decode_reply,
    decode_request,
    encode_line,
    encode_shown,
    raw,
)


def test_request_survives_the_wire():
    line = encode_line(Request(7, "vm.stop", raw({"name": "a"})))
    request = decode_request(line.rstrip(b"\n"))
    assert (request.id, request.method, bytes(request.params)) == (7, "vm.stop", b'{"name":"a"}')


def test_message_is_one_line_even_if_a_string_has_newlines():
    line = encode_line(Request(1, "x", raw({"name": "a\nb"})))
    assert line.count(b"\n") == 1


def test_problem_arrives_as_the_failure_that_was_sent():
    sent = CommandError("vm c: no SEV ASID", os.EX_TEMPFAIL, 16)
    reply = decode_reply(encode_line(Reply(3, problem=Problem.of(sent))))
    assert reply.problem is not None
    failure = reply.problem.failure()
    assert (failure.message, failure.exit_code, failure.errno) == ("vm c: no SEV ASID", 75, 16)


def test_parameter_that_is_not_utf8_is_a_usage_error():
    with pytest.raises(CommandError, match=r"^/bad\\xff: not UTF-8 text$") as caught:
        raw({"cgroup": os.fsdecode(b"/bad\xff")})
    assert caught.value.exit_code == os.EX_USAGE


def test_name_that_is_not_utf8_is_shown_with_its_bytes():
    result = [Problem(os.fsdecode(b"\xfe"), 69), {"groups": ["/a", os.fsdecode(b"/bad\xff")]}]
    assert msgspec.json.decode(encode_shown(result)) == [
        {"message": r"\xfe", "exit_code": 69, "errno": 0},
        {"groups": ["/a", r"/bad\xff"]},
    ]


def test_problem_about_a_name_that_is_not_utf8_can_be_sent():
    sent = CommandError(os.fsdecode(b"\xff: no such VM"))
    reply = decode_reply(encode_line(Reply(1, problem=Problem.of(sent))))
    assert reply.problem is not None
    assert reply.problem.message == r"\xff: no such VM"


def test_lines_come_out_whole_however_they_were_cut():
    lines = LineBuffer()
    assert list(lines.feed(b"on")) == []
    assert list(lines.feed(b"e\ntwo\nth")) == [b"one", b"two"]
    assert list(lines.feed(b"ree\n")) == [b"three"]


def test_line_over_the_limit_is_refused_before_it_is_complete():
    lines = LineBuffer(limit=4)
    with pytest.raises(LineTooLongError):
        list(lines.feed(b"12345"))


@pytest.mark.parametrize("line", [b"", b"[]", b"{}", b'{"id": "x", "method": 1}', b"\xff"])
def test_request_of_another_form_is_a_protocol_error(line):
    with pytest.raises(CommandError) as caught:
        decode_request(line)
    assert caught.value.exit_code == os.EX_PROTOCOL


def test_reply_of_another_form_is_a_protocol_error():
    with pytest.raises(CommandError) as caught:
        decode_reply(b"hello")
    assert caught.value.exit_code == os.EX_PROTOCOL
