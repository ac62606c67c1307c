"""Runs a guest on both engines and says where they part."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

from fuzz.explained import STRINGS
from fuzz.machine import HANDLERS, PAGE, TABLES, Outcome, image
from fuzz.opcodes import STATUS

HERE = Path(__file__).parent
RF = 1 << 16
PF, AC = 14, 17
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS")
LEVELS = frozenset(range(TABLES, TABLES + 4 * PAGE, PAGE))


class Worker:
    """An engine in a process that is started again when it dies.

    Args:
        module: ``fuzz.second`` or ``fuzz.subject``.
    """

    def __init__(self, module):
        self.module = module
        self.deaths = 0
        self._process = None

    def run(self, case):
        """The outcome of a guest; kind ``died``, if the process died of it."""
        if self._process is None:
            path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
            )
        process = self._process
        try:
            pickle.dump(case, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            self.close()
            self.deaths += 1
            return Outcome("died", str(process.returncode))

    def close(self):
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.stdin.close()
            process.wait()
            process.stdout.close()


def _end_of(vector):
    """RIP behind the handler of a vector."""
    return HANDLERS + 8 * vector + 2


def differences(ours, theirs, case):
    """What is different and not explained, by name; empty: nothing."""
    if theirs.kind == "skip" or theirs.known or _is_known(ours, theirs):
        return {}
    if ours.kind != theirs.kind:
        return {"kind": (f"{ours.kind} {ours.detail}", f"{theirs.kind} {theirs.detail}")}
    if ours.kind in {"limit", "shutdown", "mmio", "error"}:
        return {}
    found = {
        **_numbers(ours, theirs, case),
        **_segments(ours, theirs, case),
        **_memory(ours.pages, theirs.pages, image(case), theirs.undefined),
    }
    # The second engine computes status flags when they are used; what PUSHF stored is compared.
    if (ours.flags ^ theirs.flags) & ~RF & ~STATUS:
        found["flags"] = (hex(ours.flags), hex(theirs.flags))
    return {name: pair for name, pair in found.items() if name not in theirs.spared}


def _is_known(ours, theirs):
    """Ways to end that mean the same, or whose difference is explained."""
    if theirs.kind == "limit":
        return True  # it was stopped before its end
    if (ours.kind, theirs.kind) == ("error", "mmio"):
        return True  # a fetch, or the frame of an exception, where there is no memory
    if (ours.rip, theirs.rip) == (_end_of(PF), _end_of(AC)):
        return True  # Bochs checks alignment before it walks page tables, against SDM table 6-2
    return ours.kind == "limit" and bool(STRINGS & set(theirs.executed))  # a long repetition


def _numbers(ours, theirs, case):
    mask = (1 << 64) - 1 if case.bits == 64 else 0xFFFF_FFFF
    pairs = {"rip": (ours.rip & mask, theirs.rip & mask)}
    for number, pair in enumerate(zip(ours.general, theirs.general, strict=True)):
        pairs[f"r{number}"] = pair
    for number, pair in zip(
        (0, 2, 3, 4), zip(ours.control, theirs.control, strict=True), strict=True
    ):
        pairs[f"cr{number}"] = pair
    return {name: tuple(map(hex, pair)) for name, pair in pairs.items() if pair[0] != pair[1]}


def _segments(ours, theirs, case):
    """Segment registers; what a null selector hides does not count, nor rights of real mode."""
    found = {}
    for name, *pair in zip(SEGMENTS, ours.segments, theirs.segments, strict=True):
        shown = 2 if case.mode == "real" else 1 if pair[0][0] < 4 else 4
        one, other = (segment[:shown] for segment in pair)
        if one != other:
            found[name] = (tuple(map(hex, one)), tuple(map(hex, other)))
    return found


def _memory(ours, theirs, before, undefined):
    """Bytes that differ, by page; accessed and dirty bits do not count."""
    found = {}
    for page in ours.keys() | theirs.keys():
        same = before[page : page + PAGE]
        one, other = ours.get(page, same), theirs.get(page, same)
        ignored = 0x60 if page in LEVELS else 0
        stored = undefined if page not in LEVELS else 0
        bytes_that_differ = [
            (hex(page + at), f"{one[at]:02x}", f"{other[at]:02x}")
            for at in range(PAGE)
            if (one[at] ^ other[at]) & ~(0 if at % 8 else ignored) & ~(stored | stored >> 8)
        ]
        if bytes_that_differ:
            found[f"page {page:#x}"] = bytes_that_differ
    return found
