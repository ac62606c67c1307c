"""Random operations carried out in two worlds, compared after every step."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.calls import attempt, eventually, numbers, write
from conformance.kids import Kid, fork_sleeper, start_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

# More of them: KVMSIM_WALKS=100 .venv/bin/pytest tests/conformance -k walk
WALKS = int(os.environ.get("KVMSIM_WALKS", "4"))
STEPS = 100
KIDS = 3
# Linux freezes, and counts what it takes down, a while after the write.
SETTLE_S = 3.0

Snapshot = dict[str, dict[str, Any]]


class Walker:
    """One world in which a walk takes place: a cgroup D and some processes.

    Results and snapshots are in words that all worlds share: processes and threads have labels.
    """

    def __init__(self, d: Path) -> None:
        self.d = d
        self.kids: dict[int, Kid] = {}
        self.labels: dict[int, str] = {}
        for index in range(KIDS):
            self.start(index)

    def start(self, index: int) -> None:
        """Starts process `index`, with a second thread."""
        kid = self.kids[index] = Kid()
        self.labels[kid.pid] = f"k{index}"
        self.labels[kid.do(start_thread)] = f"k{index}t"

    def end(self) -> None:
        """Ends all processes."""
        for kid in self.kids.values():
            kid.end()

    def prepare(self) -> None:
        """Called before every step, in both worlds."""

    def step(self, operation: tuple[Any, ...]) -> Any:
        """Carries out one operation."""
        name, *arguments = operation
        return getattr(self, f"do_{name}")(*arguments)

    def do_mkdir(self, where: str) -> Any:
        return attempt(os.mkdir, self.d / where)

    def do_rmdir(self, where: str) -> Any:
        return attempt(os.rmdir, self.d / where)

    def do_rename(self, where: str, to: str) -> Any:
        return attempt(os.rename, self.d / where, self.d / to)

    def do_write(self, where: str, name: str, text: str) -> Any:
        result = write(self.d / where / name, text.encode())
        return "ok" if result == len(text) else result

    def do_move(self, index: int, thread: str, where: str, name: str) -> Any:
        tid = next(t for t, label in self.labels.items() if label == f"k{index}{thread}")
        return self.do_write(where, name, str(tid))

    def do_enter(self, index: int, where: str) -> Any:
        return self.kids[index].do(write, str(self.d / where / "cgroup.procs"), b"0")

    def do_fork(self, index: int, label: str) -> Any:
        self.labels[self.kids[index].do(fork_sleeper)] = label
        return "ok"

    def do_kill(self, index: int) -> Any:
        self.kids[index].kill()
        return "ok"

    def do_restart(self, index: int) -> Any:
        self.kids[index].end()
        self.labels = {t: label for t, label in self.labels.items() if label[:2] != f"k{index}"}
        self.start(index)
        return "ok"

    def snapshot(self) -> Snapshot:
        """Everything that the walk may have changed, by cgroup."""
        return {
            str(where.relative_to(self.d)): self.look(where)
            for where in sorted(Path(path) for path, _, _ in os.walk(self.d))
        }

    def look(self, where: Path) -> dict[str, Any]:
        """What one cgroup shows."""
        raise NotImplementedError

    def labelled(self, path: Path) -> list[Any] | str:
        """The numbers of a file as labels, in its order."""
        found = numbers(path)
        return found if isinstance(found, str) else [self.labels.get(n, n) for n in found]


def follow(walk: Any, walkers: list[Walker]) -> None:
    """Goes the same way in both worlds; `walk.next` chooses an operation by the last snapshot."""
    done: list[str] = []
    linux, _ = settled(walkers)
    for _ in range(STEPS):
        operation = walk.next(linux)
        for walker in walkers:
            walker.prepare()
        results = [walker.step(operation) for walker in walkers]
        done.append(f"{operation} -> {results}")
        history = "\n".join(done)
        assert results[0] == results[1], history
        linux, cgfs = settled(walkers)
        assert linux == cgfs, "\n".join([history, *differing(linux, cgfs)])


@contextlib.contextmanager
def ended(walkers: list[Walker]) -> Iterator[list[Walker]]:
    """Ends walkers after a block."""
    try:
        yield walkers
    finally:
        for walker in walkers:
            walker.end()


def settled(walkers: list[Walker]) -> list[Snapshot]:
    """Snapshots that agree, or after some time two that do not."""
    seen: list[Snapshot] = []
    eventually(lambda: _agree(walkers, seen), SETTLE_S)
    return seen


def _agree(walkers: list[Walker], seen: list[Snapshot]) -> bool:
    seen[:] = [walker.snapshot() for walker in walkers]
    return seen[0] == seen[1]


def differing(linux: Snapshot, cgfs: Snapshot) -> Iterator[str]:
    """One line for each file that differs."""
    for where in sorted(set(linux) | set(cgfs)):
        theirs, ours = linux.get(where, {}), cgfs.get(where, {})
        for name in theirs | ours:
            if theirs.get(name) != ours.get(name):
                yield f"{where} {name}: Linux {theirs.get(name)!r}, ours {ours.get(name)!r}"
