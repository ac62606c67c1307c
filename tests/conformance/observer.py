"""What a test saw, against what the specification says and what a real kernel answered."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent.parent / "golden"
REFERENCE = "6.18"


@dataclass(frozen=True)
class PerWorld:
    """An expectation that differs on purpose: the controllers are not the same."""

    linux: Any
    cgfs: Any


class Unstated:
    """The specification gives no value: a real kernel's answer is the expectation."""


class Noted:
    """Recorded, but each world may have its own: it depends on how a kernel was configured."""


UNSTATED = Unstated()
NOTED = Noted()


class Golden:
    """Answers of one kernel: a JSON file per test module, test -> label -> value.

    Byte strings are stored as {"text": latin-1}, as JSON has none.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._modules: dict[str, dict[str, dict[str, Any]]] = {}

    def get(self, module: str, test: str) -> dict[str, Any]:
        """All recorded values of one test."""
        return self._module(module).get(test, {})

    def put(self, module: str, test: str, values: dict[str, Any]) -> None:
        """Replaces the recorded values of one test."""
        self._module(module)[test] = values

    def save(self) -> None:
        """Writes every module that was touched."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for module, tests in self._modules.items():
            text = json.dumps(dict(sorted(tests.items())), indent=1, ensure_ascii=True)
            (self._directory / f"{module}.json").write_text(text + "\n")

    def _module(self, module: str) -> dict[str, dict[str, Any]]:
        if module not in self._modules:
            path = self._directory / f"{module}.json"
            self._modules[module] = json.loads(path.read_text()) if path.exists() else {}
        return self._modules[module]


class Observer:
    """Called by a test with every answer it got.

    On Linux the answer has to be the expected one, and is kept for the golden record. On ours it
    has to be the expected one and the recorded one; where `differences` names the label, it has
    to be another, so that a difference that has gone is noticed.
    """

    def __init__(self, kind: str, recorded: dict[str, Any], differences: dict[str, str]) -> None:
        self._kind = kind
        self._recorded = recorded
        self._differences = differences
        self.values: dict[str, Any] = {}
        self.differing: dict[str, str] = {}
        self.own_expectations = False

    def __call__(self, label: str, got: Any, expected: Any = UNSTATED) -> None:
        """Compares one answer; `label` is unique in its test."""
        __tracebackhide__ = True
        assert label not in self.values, f"two observations are labelled {label!r}"
        self.values[label] = to_json(got)
        agrees = self._agreement(label, got, expected)
        if self._kind == "cgfs" and label in self._differences:
            assert agrees is not None, f"{label!r} agrees: take it out of DIFFERENCES"
            self.differing[label] = self._differences[label]
            return
        assert agrees is None, f"{label}: {agrees}"

    def _agreement(self, label: str, got: Any, expected: Any) -> str | None:
        if expected is NOTED:
            return None
        if isinstance(expected, PerWorld):
            self.own_expectations = True
            wanted = getattr(expected, self._kind)
            return None if got == wanted else f"got {got!r}, expected {wanted!r} in this world"
        if expected is not UNSTATED and got != expected:
            return f"got {got!r}, expected {expected!r}"
        if self._kind == "cgfs" and label in self._recorded:
            wanted = self._recorded[label]
            if to_json(got) != wanted:
                return f"got {got!r}, Linux {REFERENCE} answered {wanted!r}"
        return None

    def unseen_differences(self) -> set[str]:
        """Labels the table of differences has, but the test did not observe."""
        return set(self._differences) - set(self.values) - {"*"}


def to_json(value: Any) -> Any:
    """Makes a value comparable with what JSON gives back."""
    if isinstance(value, bytes):
        return {"text": value.decode("latin-1")}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(to_json(item) for item in value)
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    return value


def kernel_version() -> str:
    """Major and minor of the running kernel."""
    return ".".join(os.uname().release.split(".")[:2])
