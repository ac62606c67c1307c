import os
import sys
import time

import pytest

from cgfs.procs import choose, open_processes
from cgfs.procs.connector import ProcConnector
from cgfs.procs.scan import ForkScan


def refuse(*_args):
    raise PermissionError(1, os.strerror(1))


def test_connector_is_used_where_it_works(connector):
    assert isinstance(connector, ProcConnector)
    assert connector.describe().startswith("process connector")


def test_scan_is_used_without_a_connector(monkeypatch):
    monkeypatch.setattr(choose, "ProcConnector", refuse)
    assert isinstance(choose.best_source(), ForkScan)


def test_scan_is_used_without_permission_to_listen(monkeypatch):
    monkeypatch.setattr(ProcConnector, "start", refuse)
    assert isinstance(choose.best_source(), ForkScan)


def test_scan_is_used_where_the_connector_stays_silent(monkeypatch):
    monkeypatch.setattr(ProcConnector, "read", lambda self, watched: iter(()))
    assert isinstance(choose.best_source(), ForkScan)


def test_scan_says_what_may_be_missed(monkeypatch, recorder):
    monkeypatch.setattr(choose, "ProcConnector", refuse)
    processes = open_processes(recorder, time.monotonic_ns)
    try:
        assert "scan" in processes.describe()
        assert "missed" in processes.describe()
    finally:
        processes.close()


@pytest.mark.parametrize("uid", [0, 65534])
def test_source_finds_a_child_whoever_we_are(start, uid):
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    child = start.python(
        "import os, sys\n"
        f"sys.path = {sys.path!r}\n"
        "from cgfs.procs.choose import best_source\n"
        f"os.setresuid({uid}, {uid}, {uid})\n"
        "source = best_source()\n"
        "source.start()\n"
        "pid = os.fork() or os._exit(0)\n"
        "print(pid in [news[-1] for news in source.read({os.getpid(): 0})])\n"
    )
    assert child.said == "True"
