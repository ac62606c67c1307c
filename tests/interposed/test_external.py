"""Programs from outside, unmodified, that run guest code of their own: on Linux's KVM and on ours.

stress-ng (Debian's package of this name) has a small VM monitor among its stressors: one vCPU in
real mode, whose code reads and writes a port some hundred times.
"""

import os
import re
import shutil
import subprocess

import pytest
from selftests import source, worlds
from sessions.session import why_no_fuse

TIMEOUT_S = 100


@pytest.fixture(scope="module", params=["linux", "milan509-es99", "spr-buslock"])
def world(request, tmp_path_factory):
    """The machine's KVM, and emulated hosts of both vendors."""
    if request.param != "linux" and (reason := why_no_fuse()):
        pytest.skip(reason)
    scratch = tmp_path_factory.mktemp("external")
    made = worlds.real() if request.param == "linux" else worlds.emulated(scratch, request.param)
    try:
        with made as started:
            yield started
    except source.UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def stress_ng():
    path = shutil.which("stress-ng")
    if path is None:
        pytest.skip("needs Debian's package stress-ng")
    return path


def output(world, *command):
    """What a program prints, without process ids and times; and its status."""
    done = subprocess.run(
        [*world.command, *command],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    text = re.sub(r"\[\d+\]|\d+\.\d+s", "", done.stdout + done.stderr)
    return done.returncode, [" ".join(line.split()) for line in text.splitlines()]


def test_stress_ng_runs_its_guest_to_the_end(world, stress_ng):
    status, lines = output(world, stress_ng, "--kvm", "1", "--kvm-ops", "3")
    assert (status, lines) == (
        0,
        [
            "stress-ng: info: defaulting to a 86400 second (1 day, 0.00 secs) run per stressor",
            "stress-ng: info: dispatching hogs: 1 kvm",
            "stress-ng: info: kvm: KVM kernel API version 12",
            "stress-ng: info: successful run completed in",
        ],
    )
    assert world.left_behind() == ""


def test_stress_ng_counts_what_its_guests_did(world, stress_ng):
    """Two instances, four operations together; one "bogo op" is a VM whose guest ran to its end."""
    status, lines = output(
        world, stress_ng, "--kvm", "2", "--kvm-ops", "4", "--metrics-brief", "--verify"
    )
    counted = [line.split()[2:4] for line in lines if re.match(r"stress-ng: \w+: kvm \d", line)]
    assert (status, counted) == (0, [["kvm", "4"]]), lines
    assert world.left_behind() == ""
