import os
from pathlib import Path

import pytest
from selftests import source


def make_built(cache, version, mtime):
    directory = cache / version / source.BUILT
    directory.mkdir(parents=True)
    (directory / "a_test").touch()
    os.utime(directory, (mtime, mtime))
    return directory


def test_cache_is_where_the_user_keeps_caches(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/cache")
    assert source.cache_directory() == Path("/var/tmp/cache/kvmsim/selftests")


def test_empty_variable_means_the_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source.cache_directory() == tmp_path / ".cache/kvmsim/selftests"


def test_nothing_is_built_in_an_empty_cache(tmp_path):
    assert source.built(tmp_path) is None


def test_what_was_built_last_is_taken_without_building(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_build", pytest.fail)
    make_built(tmp_path, "6.12.117-1", 1000)
    newest = make_built(tmp_path, "6.12.95-1", 2000)
    assert source.programs(tmp_path) == newest
    assert source.found(newest) == {"a_test": newest / "a_test"}


def test_machine_without_apt_is_told_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(source.UnavailableError, match="needs apt, which has Debian's linux-source"):
        source.programs(tmp_path / "cache")


def test_failed_fetch_leaves_no_half_built_tests(tmp_path, monkeypatch):
    def fail(_work):
        raise source.UnavailableError("apt-get: no network")

    monkeypatch.setattr(source, "_need_programs", lambda: None)
    monkeypatch.setattr(source, "_fetch", fail)
    with pytest.raises(source.UnavailableError, match="no network"):
        source.programs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
