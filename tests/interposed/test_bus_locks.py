"""What Linux's test of bus lock exits asserts (kvm.md A.7), on emulated machines that have them."""

import subprocess

import pytest
from selftests import source, worlds
from sessions.session import why_no_fuse

NO_BUS_LOCK_EXITS = 4


@pytest.fixture(scope="module", params=["spr-buslock", "turin1006"])
def world(request, tmp_path_factory):
    """A machine whose exits come behind the lock, and one whose exits come before it."""
    if reason := why_no_fuse():
        pytest.skip(reason)
    try:
        with worlds.emulated(tmp_path_factory.mktemp("buslock"), request.param) as started:
            yield started
    except source.UnavailableError as reason:
        pytest.skip(str(reason))


def exits(world, program, *arguments):
    """How many bus lock exits the program says it had."""
    command = [*world.command, str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("count", [100, 5000])
def test_every_split_lock_is_one_exit_at_the_right_place(world, compiled, count):
    assert exits(world, compiled("buslock"), count) == count


def test_locks_within_a_line_are_none(world, compiled):
    assert exits(world, compiled("buslock"), 5000, 4) == 0


def test_a_machine_without_them_says_so(compiled, tmp_path):
    if reason := why_no_fuse():
        pytest.skip(reason)
    with worlds.emulated(tmp_path, "milan509-es99") as world:
        done = subprocess.run([*world.command, str(compiled("buslock"))], timeout=60, check=False)
    assert done.returncode == NO_BUS_LOCK_EXITS
