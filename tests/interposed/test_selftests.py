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
def world_of(tmp_path_factory):
    """Start the host of a preset, the first time it is asked for."""
    if reason := why_no_fuse():
        pytest.skip(reason)
    started = {}
    with contextlib.ExitStack() as stack:

        def start(preset):
            if preset not in started:
                host = worlds.emulated(tmp_path_factory.mktemp("selftests"), preset)
                try:
                    started[preset] = stack.enter_context(host)
                except source.UnavailableError as reason:
                    pytest.skip(str(reason))
            return started[preset]

        yield start


@pytest.mark.parametrize("name", QUICK)
def test_selftest_comes_to_what_the_list_says(programs, world_of, tmp_path, name):
    entry = QUICK[name]
    world = world_of(entry.preset)
    outcome = run([*world.command, str(programs[name])], entry.timeout_s, str(tmp_path))
    assert deviation(entry, outcome.result, world.left_behind()) == "", outcome.output
