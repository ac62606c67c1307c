"""cgroup.freeze and cgroup.kill (spec C.3, F.6)."""

import pytest

from cgfs.core import freezer
from cgfs.core.caller import Caller


@pytest.fixture
def nested(shell):
    shell.mkdir("/d")
    shell.mkdir("/d/c")
    return shell


def test_empty_cgroup_is_frozen_at_once(nested):
    nested.echo("1", "/d/cgroup.freeze")
    assert nested.cat("/d/cgroup.events") == "populated 0\nfrozen 1\n"


def test_freezing_reaches_descendants_but_not_their_setting(nested, processes):
    nested.echo(f"{processes.start(100)}", "/d/c/cgroup.procs")
    nested.echo("1", "/d/cgroup.freeze")
    assert nested.cat("/d/c/cgroup.freeze") == "0\n"
    assert nested.cat("/d/c/cgroup.events") == "populated 1\nfrozen 1\n"
    assert processes.frozen == {100}


def test_own_setting_outlasts_the_ancestors(nested, processes):
    nested.echo(f"{processes.start(100)}", "/d/c/cgroup.procs")
    nested.echo("1", "/d/cgroup.freeze")
    nested.echo("1", "/d/c/cgroup.freeze")
    nested.echo("0", "/d/cgroup.freeze")
    assert nested.cat("/d/cgroup.events") == "populated 1\nfrozen 0\n"
    assert nested.cat("/d/c/cgroup.events") == "populated 1\nfrozen 1\n"
    assert processes.frozen == {100}


def test_process_that_has_not_stopped_yet_is_not_frozen(nested, processes):
    nested.echo(f"{processes.start(100)}", "/d/cgroup.procs")
    nested.echo("1", "/d/cgroup.freeze")
    processes.frozen.clear()
    assert nested.cat("/d/cgroup.events") == "populated 1\nfrozen 0\n"


def test_reader_inside_is_not_waited_for(nested, processes):
    nested.echo(f"{processes.start(100, 101)}", "/d/cgroup.procs")
    nested.echo("1", "/d/cgroup.freeze")
    processes.frozen.clear()
    assert nested.cat("/d/cgroup.events", Caller(0, 0, 101)) == "populated 1\nfrozen 1\n"


def test_new_child_of_a_frozen_cgroup_is_frozen(nested):
    nested.echo("1", "/d/cgroup.freeze")
    nested.mkdir("/d/new")
    assert nested.cat("/d/new/cgroup.freeze") == "0\n"
    assert nested.cat("/d/new/cgroup.events") == "populated 0\nfrozen 1\n"


def test_moving_in_freezes_and_moving_out_thaws(nested, processes):
    nested.echo("1", "/d/c/cgroup.freeze")
    nested.echo(f"{processes.start(100)}", "/d/c/cgroup.procs")
    assert processes.frozen == {100}
    nested.echo("100", "/d/cgroup.procs")
    assert processes.frozen == set()


def test_emulated_process_hears_of_it(nested, roots, owner):
    roots.spawn(roots.v2.find("/d/c"), owner)
    nested.echo("1", "/d/cgroup.freeze")
    nested.echo("0", "/d/cgroup.freeze")
    assert owner.heard == [("frozen", True), ("frozen", False)]


def test_same_setting_again_generates_no_event(nested, recorder):
    nested.echo("1", "/d/cgroup.freeze")
    before = len(recorder.heard)
    nested.echo("1", "/d/cgroup.freeze")
    assert len(recorder.heard) == before


def test_freeze_generates_one_event_on_each_cgroup(nested, recorder):
    nested.echo("1", "/d/cgroup.freeze")
    assert recorder.of("modified") == [("/d", "cgroup.events"), ("/d/c", "cgroup.events")]


def test_setting_without_effect_generates_an_event_there(nested, recorder):
    nested.echo("1", "/d/cgroup.freeze")
    before = len(recorder.heard)
    nested.echo("1", "/d/c/cgroup.freeze")
    assert recorder.heard[before:] == [("modified", "/d/c", "cgroup.events")]


@pytest.mark.parametrize("text", ["2", "-1", "99999999999"])
def test_freeze_other_numbers_are_erange(nested, fails_with, text):
    with fails_with("ERANGE"):
        nested.echo(text, "/d/cgroup.freeze")


@pytest.mark.parametrize("text", ["abc", "\n", "1 1", "on"])
def test_freeze_other_words_are_einval(nested, fails_with, text):
    with fails_with("EINVAL"):
        nested.echo(text, "/d/cgroup.freeze")


@pytest.mark.parametrize("text", ["01", "0x1", "+1", "1\0", " 1\n"])
def test_freeze_takes_every_spelling_of_one(nested, text):
    nested.echo(text, "/d/cgroup.freeze")
    assert nested.cat("/d/cgroup.freeze") == "1\n"


@pytest.mark.parametrize("text", ["0", "2", "-1"])
def test_kill_other_numbers_are_erange(nested, fails_with, text):
    with fails_with("ERANGE"):
        nested.echo(text, "/d/cgroup.kill")


def test_kill_reaches_the_whole_subtree(nested, processes):
    nested.echo(f"{processes.start(100)}", "/d/cgroup.procs")
    nested.echo(f"{processes.start(200)}", "/d/c/cgroup.procs")
    nested.echo("1", "/d/cgroup.kill")
    assert sorted(processes.killed) == [100, 200]


def test_kill_finds_children_forked_meanwhile(nested, roots, processes):
    nested.echo(f"{processes.start(100)}", "/d/cgroup.procs")

    def fork_once():
        if processes.killed == [100] and 101 not in processes.table:
            processes.start(101)
            roots.tasks.forked(100, 100, 101, 101, 0)

    processes.on_sync = fork_once
    nested.echo("1", "/d/cgroup.kill")
    assert processes.killed == [100, 101]


def test_kill_tells_the_owner_of_an_emulated_process(nested, roots, owner):
    roots.spawn(roots.v2.find("/d"), owner)
    nested.echo("1", "/d/cgroup.kill")
    assert owner.heard == ["killed"]


def test_process_that_stops_late_generates_an_event_where_it_is_frozen(
    nested, roots, processes, recorder
):
    nested.echo(f"{processes.start(100)}", "/d/c/cgroup.procs")
    nested.echo("1", "/d/c/cgroup.freeze")
    before = len(recorder.heard)
    roots.tasks.stopped(100)
    roots.tasks.stopped(999)
    assert recorder.heard[before:] == [("modified", "/d/c", "cgroup.events")]


def test_child_forked_before_the_parent_stopped_is_waited_for(nested, roots, processes):
    nested.echo(f"{processes.start(100)}", "/d/c/cgroup.procs")
    nested.echo("1", "/d/cgroup.freeze")
    asked = []

    def is_frozen(pid):
        if not asked:
            processes.start(101)
            roots.tasks.forked(100, 100, 101, 101, 0)
        asked.append(pid)
        return pid == 100

    processes.is_frozen = is_frozen
    assert nested.cat("/d/cgroup.events") == "populated 1\nfrozen 0\n"
    assert asked == [100, 101]


@pytest.fixture
def threaded(shell, processes):
    """/d with the threaded /d/t and /d/u; process 100 in /d, its thread 101 in /d/t."""
    for path in ("/d", "/d/t", "/d/u"):
        shell.mkdir(path)
    for path in ("/d/t", "/d/u"):
        shell.echo("threaded", f"{path}/cgroup.type")
    processes.start(100, 101)
    shell.echo("100", "/d/cgroup.procs")
    shell.echo("101", "/d/t/cgroup.threads")
    return shell


def test_process_goes_on_when_its_frozen_thread_moves_out(threaded, processes):
    threaded.echo("1", "/d/t/cgroup.freeze")
    threaded.echo("101", "/d/u/cgroup.threads")
    assert processes.frozen == set()


def test_process_goes_on_when_it_takes_its_frozen_thread_home(threaded, processes):
    threaded.echo("1", "/d/t/cgroup.freeze")
    threaded.echo("100", "/d/u/cgroup.procs")
    assert processes.frozen == set()


def test_process_goes_on_when_its_frozen_thread_ends(threaded, roots, processes):
    threaded.echo("1", "/d/t/cgroup.freeze")
    processes.table[100] = [100]
    roots.tasks.exited(101, 100, 0)
    assert processes.frozen == set()


def test_process_stays_frozen_while_one_of_its_threads_is(threaded, processes):
    threaded.echo("1", "/d/t/cgroup.freeze")
    threaded.echo("1", "/d/u/cgroup.freeze")
    threaded.echo("100", "/d/u/cgroup.threads")
    threaded.echo("0", "/d/u/cgroup.freeze")
    assert processes.frozen == {100}
    assert threaded.cat("/d/t/cgroup.events") == "populated 1\nfrozen 1\n"


def test_from_one_frozen_cgroup_to_another_tells_the_process_nothing(shell, roots, owner):
    for path in ("/a", "/b"):
        shell.mkdir(path)
        shell.echo("1", f"{path}/cgroup.freeze")
    task = roots.spawn(roots.v2.find("/a"), owner)
    owner.heard.clear()
    shell.echo(f"{task.pid}", "/b/cgroup.procs")
    assert owner.heard == ["moved"]


def test_frozen_process_that_joins_a_frozen_cgroup_generates_no_event(shell, processes, recorder):
    for path in ("/a", "/b"):
        shell.mkdir(path)
    for pid, path in ((100, "/a"), (200, "/b")):
        shell.echo(f"{processes.start(pid)}", f"{path}/cgroup.procs")
        shell.echo("1", f"{path}/cgroup.freeze")
    recorder.heard.clear()
    shell.echo("100", "/b/cgroup.procs")
    assert recorder.of("modified") == [("/a", "cgroup.events")]


def test_killing_and_reading_events_looks_only_where_somebody_is(nested, processes, monkeypatch):
    looked = []
    tasks_in = freezer._tasks_in
    monkeypatch.setattr(
        freezer, "_tasks_in", lambda cgrp: looked.append(cgrp.path) or tasks_in(cgrp)
    )
    nested.mkdir("/d/e")
    nested.echo(f"{processes.start(100)}", "/d/c/cgroup.procs")
    nested.echo("1", "/d/cgroup.freeze")
    looked.clear()
    nested.cat("/d/cgroup.events")
    nested.echo("1", "/d/cgroup.kill")
    assert set(looked) == {"/d/c"}


def test_process_that_ends_with_another_is_not_killed_again(nested, roots, owner):
    class Parent(type(owner)):
        def killed(self, now_ns):
            roots.exit(child)

    roots.spawn(roots.v2.find("/d/c"), Parent())
    child = roots.spawn(roots.v2.find("/d/c"), owner)
    nested.echo("1", "/d/cgroup.kill")
    assert owner.heard == []


def test_process_that_ends_while_it_is_moved_hears_no_more(nested, roots, owner):
    class Last(type(owner)):
        def moved(self, now_ns):
            roots.exit(task)

    last = Last()
    task = roots.spawn(roots.v2.find("/d"), last)
    nested.echo("1", "/d/c/cgroup.freeze")
    nested.echo(f"{task.pid}", "/d/c/cgroup.procs")
    assert last.heard == [("frozen", True)]
    assert nested.cat("/d/c/cgroup.events") == "populated 0\nfrozen 1\n"
