"""The quick ones of Linux's own KVM selftests, where `tools/run_selftests` has built them."""

import contextlib
from pathlib import Path

import pytest
from selftests import source, worlds
from selftests.expected import deviation, load
from selftests.runs import run
from sessions.session import why_no_fuse

LISTED = load(Path(__file__).parents[2] / "tools" / "selftests" / "expected.toml")
QUICK = {name: entry for name, entry in LISTED.items() if entry.quick}


@pytest.fixture(scope="module")
def programs():
    built = source.built(source.cache_directory())
    if built is None:
        pytest.skip("needs Linux's KVM selftests: run tools/run_selftests once")
    return source.found(built)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    if reason := why_no_fuse():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        host = worlds.emulated(tmp_path_factory.mktemp("selftests"), "milan509-es99")
        try:
            started = stack.enter_context(host)
        except source.UnavailableError as reason:
            pytest.skip(str(reason))
        yield started


@pytest.mark.parametrize("name", QUICK)
def test_selftest_comes_to_what_the_list_says(programs, world, tmp_path, name):
    outcome = run([*world.command, str(programs[name])], QUICK[name].timeout_s, str(tmp_path))
    problem = deviation(QUICK[name], outcome.result, world.left_behind())
    assert problem == "", outcome.output
