"""Hosts that are no x86-64, or give no executable memory: Python does the work.

In a process of its own, for machine code changes the emulator's library for the whole process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[3]


@pytest.mark.parametrize(
    "names",
    [
        ["vm", "guest", "bus_lock"],
        ["descriptor_locks", "dirty_pages", "code_watch", "breakpoints"],
        ["branches", "faults"],
        ["delivery", "instructions", "robustness"],
    ],
    ids=" ".join,
)
def test_the_engine_does_the_same_without_machine_code(names):
    files = [str(HERE / f"test_{name}.py") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "without_machine_code", *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
