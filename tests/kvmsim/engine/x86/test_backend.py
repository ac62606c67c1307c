"""The emulator below: found, checked, refused in one line."""

import sys

import pytest

from kvmsim.engine.x86 import backend
from kvmsim.errors import ConfigError


def test_without_the_package_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "unicorn.unicorn_py3.unicorn", None)
    with pytest.raises(ConfigError, match=r"^[^\n]*extra x86$"):
        backend.load()


def test_another_release_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "RELEASE", (2, 1, 5))
    with pytest.raises(ConfigError, match=r"needs Unicorn 2\.1\.5, not 2\.1\.4"):
        backend.load()


def test_many_instances_find_their_own_state():
    made = [backend.Unicorn() for _ in range(20)]
    for number, unicorn in enumerate(made):
        unicorn.q[0] = number
    assert [unicorn.q[0] for unicorn in made] == list(range(20))
    for unicorn in made:
        unicorn.close()


def test_closing_twice_is_harmless():
    unicorn = backend.Unicorn()
    unicorn.close()
    unicorn.close()
