"""Chance: seeded streams, one per vCPU, that do not depend on each other.

A stream is derived from the run's seed and the name of what draws from it, never from the order in
which things are made: adding a VM leaves the chance of all others as it was.
"""

from __future__ import annotations

from hashlib import blake2b
from random import Random


def derive_seed(seed: int, *path: str | int) -> int:
    """A 64-bit seed for what ``path`` names, the same in every process and Python version."""
    text = "\0".join(str(part) for part in (seed, *path))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class Stream:
    """A source of chance.

    Args:
        seed: of the run.
        path: who draws, such as the name of a VM and the id of a vCPU.

    Attributes:
        random: the next number, 0 <= x < 1, with 53 random bits. Of the generator's methods only
            this one promises the same sequence in every version of Python.
    """

    __slots__ = ("random",)

    def __init__(self, seed: int, *path: str | int) -> None:
        # Not for secrets: a run must be repeatable.
        self.random = Random(derive_seed(seed, *path)).random


def vcpu_stream(seed: int, vm_name: str, vcpu_id: int) -> Stream:
    """The chance of one vCPU."""
    return Stream(seed, "vcpu", vm_name, vcpu_id)
