"""Writes to cgroup.procs: order of checks, and who may (spec C.3, C.6, F.4, F.9)."""

import pytest

from cgfs.core.caller import Caller


@pytest.fixture
def nested(shell):
    for path in ("/d", "/d/a", "/d/b"):
        shell.mkdir(path)
    return shell


@pytest.mark.parametrize("spelling", ["100", " 100 \n", "0x64", "0144", "+100", "100\0junk"])
def test_every_spelling_of_a_pid_moves_it(nested, processes, spelling):
    processes.start(100)
    nested.echo(spelling, "/d/a/cgroup.procs")
    assert nested.cat("/d/a/cgroup.procs") == "100\n"


@pytest.mark.parametrize(
    "text",
    ["\n", " ", "abc", "-1", "1 2", "1\n2", "0x", "1.5", "100 x", "\0", "2147483648", "9" * 23],
)
def test_bad_number_is_always_einval(nested, fails_with, text):
    with fails_with("EINVAL"):
        nested.echo(text, "/d/a/cgroup.procs")


def test_unknown_pid_is_esrch(nested, fails_with):
    with fails_with("ESRCH"):
        nested.echo("2147483647", "/d/a/cgroup.procs")


def test_kernel_thread_is_einval(nested, processes, fails_with):
    processes.kthreads.add(processes.start(2))
    with fails_with("EINVAL"):
        nested.echo("2", "/d/a/cgroup.procs")


def test_zero_means_the_opener(nested, processes):
    processes.start(100, 101)
    nested.echo("0", "/d/a/cgroup.procs", Caller(0, 0, 101))
    assert nested.cat("/d/a/cgroup.procs") == "100\n"


def test_thread_id_moves_the_whole_process(nested, processes):
    processes.start(100, 101)
    nested.echo("101", "/d/a/cgroup.procs")
    assert nested.cat("/d/a/cgroup.threads") == "100\n101\n"


def test_order_is_that_of_joining(nested, processes):
    for pid in (300, 200, 100):
        nested.echo(f"{processes.start(pid)}", "/d/a/cgroup.procs")
    nested.echo("300", "/d/b/cgroup.procs")
    nested.echo("300", "/d/a/cgroup.procs")
    nested.echo("100", "/d/a/cgroup.procs")
    assert nested.cat("/d/a/cgroup.procs") == "200\n100\n300\n"


def test_zombie_stays_where_it_is(nested, processes):
    processes.zombies.add(processes.start(100))
    nested.echo("100", "/d/a/cgroup.procs")
    assert nested.cat("/d/a/cgroup.procs") == ""


def test_cgroup_with_controllers_below_takes_no_process(nested, processes, fails_with):
    nested.echo("+misc", "/cgroup.subtree_control")
    nested.echo("+misc", "/d/cgroup.subtree_control")
    with fails_with("EBUSY"):
        nested.echo(f"{processes.start(100)}", "/d/cgroup.procs")


def test_root_takes_processes_whatever_it_enables(nested, processes):
    nested.echo("+misc", "/cgroup.subtree_control")
    nested.echo(f"{processes.start(100)}", "/d/a/cgroup.procs")
    nested.echo("100", "/cgroup.procs")
    assert nested.cat("/cgroup.procs") == "100\n"
    assert processes.watched == set()


def test_thread_to_another_domain_is_eopnotsupp(nested, processes, fails_with):
    processes.start(100)
    with fails_with("EOPNOTSUPP"):
        nested.echo("100", "/d/a/cgroup.threads")


def test_invisible_process_shows_as_zero(nested, processes):
    nested.echo(f"{processes.start(100)}", "/d/a/cgroup.procs")
    processes.invisible.add(100)
    assert nested.cat("/d/a/cgroup.procs") == "0\n"


def test_newcomer_from_outside_the_delegation_is_eacces(nested, processes, user, fails_with):
    nested.file("/d/a/cgroup.procs")[0].own_attributes(2).uid = user.uid
    with fails_with("EACCES"):
        nested.echo(f"{processes.start(100)}", "/d/a/cgroup.procs", user)


def test_common_ancestor_decides(nested, processes, user, fails_with):
    nested.echo(f"{processes.start(100)}", "/d/a/cgroup.procs")
    slot = nested.file("/d/cgroup.procs")[1]
    with fails_with("EACCES"):
        nested.echo("100", "/d/b/cgroup.procs", user)
    nested.file("/d/cgroup.procs")[0].own_attributes(slot).uid = user.uid
    nested.echo("100", "/d/b/cgroup.procs", user)
    assert nested.cat("/d/b/cgroup.procs") == "100\n"


def test_open_mode_of_the_common_ancestor_suffices(nested, processes, user):
    nested.echo(f"{processes.start(100)}", "/d/a/cgroup.procs")
    node, slot = nested.file("/d/cgroup.procs")
    node.own_attributes(slot).mode = 0o666
    nested.echo("100", "/d/b/cgroup.procs", user)
    assert nested.cat("/d/b/cgroup.procs") == "100\n"


def test_supplementary_group_counts(nested, processes):
    nested.echo(f"{processes.start(100)}", "/d/a/cgroup.procs")
    node, slot = nested.file("/d/cgroup.procs")
    node.own_attributes(slot).mode = 0o664
    node.own_attributes(slot).gid = 77
    nested.echo("100", "/d/b/cgroup.procs", Caller(5, 5, 1, frozenset({77})))
    assert nested.cat("/d/b/cgroup.procs") == "100\n"


def test_removed_cgroup_is_enodev(nested, processes, fails_with):
    node, slot = nested.file("/d/b/cgroup.procs")
    nested.rmdir("/d/b")
    with fails_with("ENODEV"):
        node.rows[slot - 1].write(node, b"abc", Caller(0, 0, 1), 0)
