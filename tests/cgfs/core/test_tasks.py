"""Membership over process life (spec C.11), and the events it generates (C.9)."""

import pytest

from cgfs.core.tasks import FIRST_EMULATED_PID


@pytest.fixture
def nested(shell, processes):
    shell.mkdir("/d")
    shell.mkdir("/d/c")
    shell.echo(f"{processes.start(100)}", "/d/c/cgroup.procs")
    return shell


def test_child_joins_its_parents_cgroup(nested, roots, processes):
    processes.start(101)
    roots.tasks.forked(100, 100, 101, 101, 0)
    assert nested.cat("/d/c/cgroup.procs") == "100\n101\n"


def test_child_of_an_untracked_process_is_not_tracked(roots, processes):
    processes.start(301)
    roots.tasks.forked(300, 300, 301, 301, 0)
    assert processes.watched == set()


def test_child_stays_when_the_parent_moves(nested, roots, processes):
    processes.start(101)
    roots.tasks.forked(100, 100, 101, 101, 0)
    nested.echo("100", "/d/cgroup.procs")
    assert nested.cat("/d/c/cgroup.procs") == "101\n"


def test_last_exit_empties_the_cgroup_and_its_ancestors(nested, roots, processes):
    processes.zombies.add(100)
    roots.tasks.exited(100, 100, 0)
    assert nested.cat("/d/c/cgroup.procs") == ""
    assert nested.cat("/d/cgroup.events") == "populated 0\nfrozen 0\n"
    assert processes.watched == set()


def test_exit_of_the_leader_keeps_the_process_while_a_thread_lives(nested, roots, processes):
    processes.table[100] = [101]
    roots.tasks.exited(100, 100, 0)
    assert nested.cat("/d/c/cgroup.procs") == "100\n"


def test_first_process_generates_an_event_up_the_tree(shell, processes, recorder):
    shell.mkdir("/d")
    shell.mkdir("/d/c")
    shell.echo(f"{processes.start(100)}", "/d/c/cgroup.procs")
    assert recorder.of("modified") == [("/d/c", "cgroup.events"), ("/d", "cgroup.events")]


def test_second_process_generates_none(nested, processes, roots):
    before = roots.v2.find("/d/c").sequence(6)
    nested.echo(f"{processes.start(200)}", "/d/c/cgroup.procs")
    assert roots.v2.find("/d/c").sequence(6) == before


def test_emulated_process_has_a_pid_no_real_one_has(roots, shell, owner):
    shell.mkdir("/d")
    task = roots.spawn(roots.v2.find("/d"), owner)
    assert task.pid == FIRST_EMULATED_PID
    assert shell.cat("/d/cgroup.procs") == f"{FIRST_EMULATED_PID}\n"


def test_emulated_process_moves_like_any_pid(roots, nested, owner):
    task = roots.spawn(roots.v2.find("/d"), owner)
    nested.echo(f"{task.pid}", "/d/c/cgroup.procs")
    assert nested.cat("/d/c/cgroup.procs") == f"100\n{task.pid}\n"
    assert owner.heard == ["moved"]


def test_ended_emulated_process_is_gone_everywhere(roots, shell, owner, fails_with):
    shell.mkdir("/d")
    task = roots.spawn(roots.v2.find("/d"), owner)
    roots.exit(task)
    assert shell.cat("/d/cgroup.procs") == ""
    with fails_with("ESRCH"):
        shell.echo(f"{task.pid}", "/d/cgroup.procs")


def test_emulated_process_in_the_root_is_listed_there(roots, shell, processes, owner):
    processes.start(1)
    task = roots.spawn(roots.v2.root, owner)
    assert shell.cat("/cgroup.procs") == f"1\n{task.pid}\n"


def test_spawn_where_processes_may_not_live_is_refused(roots, shell, owner, fails_with):
    shell.mkdir("/d")
    shell.echo("+misc", "/cgroup.subtree_control")
    shell.echo("+misc", "/d/cgroup.subtree_control")
    with fails_with("EBUSY"):
        roots.spawn(roots.v2.find("/d"), owner)


def test_forked_in_a_frozen_cgroup_is_frozen(nested, roots, processes):
    nested.echo("1", "/d/cgroup.freeze")
    processes.start(101)
    roots.tasks.forked(100, 100, 101, 101, 0)
    assert processes.frozen == {100, 101}


def test_thread_cloned_by_a_stray_joins_it(shell, roots, processes):
    for path in ("/A", "/A/B"):
        shell.mkdir(path)
    shell.echo("threaded", "/A/B/cgroup.type")
    shell.echo(f"{processes.start(100, 101)}", "/A/cgroup.procs")
    shell.echo("101", "/A/B/cgroup.threads")
    processes.table[100].append(102)
    roots.tasks.forked(101, 100, 102, 100, 0)
    assert shell.cat("/A/B/cgroup.threads") == "101\n102\n"
    assert shell.cat("/A/cgroup.threads") == "100\n"


def test_exit_of_a_stray_thread_empties_its_cgroup(shell, roots, processes):
    for path in ("/A", "/A/B"):
        shell.mkdir(path)
    shell.echo("threaded", "/A/B/cgroup.type")
    shell.echo(f"{processes.start(100, 101)}", "/A/cgroup.procs")
    shell.echo("101", "/A/B/cgroup.threads")
    processes.table[100].remove(101)
    roots.tasks.exited(101, 100, 0)
    assert shell.cat("/A/B/cgroup.events") == "populated 0\nfrozen 0\n"
    assert shell.cat("/A/cgroup.threads") == "100\n"


def test_exit_of_the_only_thread_outside_the_roots_ends_the_tracking(shell, roots, processes):
    shell.mkdir("/t")
    shell.echo("threaded", "/t/cgroup.type")
    processes.start(100, 101)
    shell.echo("101", "/t/cgroup.threads")
    assert processes.watched == {100}
    processes.table[100].remove(101)
    roots.tasks.exited(101, 100, 0)
    assert processes.watched == set()


def test_move_to_a_sibling_generates_no_event_on_the_parent(nested, roots, recorder):
    nested.mkdir("/d/e")
    recorder.heard.clear()
    nested.echo("100", "/d/e/cgroup.procs")
    assert recorder.of("modified") == [("/d/e", "cgroup.events"), ("/d/c", "cgroup.events")]


def test_move_down_generates_no_event_on_the_parent(nested, roots, recorder):
    nested.echo("100", "/d/cgroup.procs")
    recorder.heard.clear()
    nested.echo("100", "/d/c/cgroup.procs")
    assert recorder.of("modified") == [("/d/c", "cgroup.events")]


def test_thread_that_moves_to_a_sibling_tells_the_parent_nothing(shell, processes, recorder):
    for path in ("/d", "/d/t", "/d/u"):
        shell.mkdir(path)
    for path in ("/d/t", "/d/u"):
        shell.echo("threaded", f"{path}/cgroup.type")
    processes.start(100, 101)
    shell.echo("100", "/d/cgroup.procs")
    shell.echo("101", "/d/t/cgroup.threads")
    recorder.heard.clear()
    shell.echo("101", "/d/u/cgroup.threads")
    assert recorder.of("modified") == [("/d/u", "cgroup.events"), ("/d/t", "cgroup.events")]
