"""cgroup.type: threaded cgroups and what they make of their neighbours (spec C.10, F.6)."""

import pytest


@pytest.fixture
def nested(shell):
    """A/B threaded, with B/C below and A/X beside."""
    for path in ("/A", "/A/B", "/A/B/C", "/A/X"):
        shell.mkdir(path)
    shell.echo("threaded", "/A/B/cgroup.type")
    return shell


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/A", "domain threaded\n"),
        ("/A/B", "threaded\n"),
        ("/A/B/C", "domain invalid\n"),
        ("/A/X", "domain invalid\n"),
    ],
)
def test_one_threaded_child_changes_its_relatives(nested, path, shown):
    assert nested.cat(f"{path}/cgroup.type") == shown


@pytest.mark.parametrize("text", ["domain", "Threaded", "threaded2", "\n"])
def test_other_words_are_einval(shell, fails_with, text):
    shell.mkdir("/A")
    with fails_with("EINVAL"):
        shell.echo(text, "/A/cgroup.type")


def test_threaded_again_succeeds(nested):
    nested.echo("threaded \n", "/A/B/cgroup.type")
    assert nested.cat("/A/B/cgroup.type") == "threaded\n"


@pytest.mark.parametrize("path", ["/A/B/C", "/A/X"])
def test_process_into_an_invalid_domain_is_eopnotsupp(nested, processes, fails_with, path):
    with fails_with("EOPNOTSUPP"):
        nested.echo(f"{processes.start(100)}", f"{path}/cgroup.procs")


def test_procs_of_an_invalid_domain_read_empty(nested):
    assert nested.cat("/A/B/C/cgroup.procs") == ""


def test_procs_of_a_threaded_cgroup_cannot_be_read(nested, fails_with):
    with fails_with("EOPNOTSUPP"):
        nested.cat("/A/B/cgroup.procs")


def test_process_in_a_threaded_cgroup_shows_in_its_thread_root(nested, processes):
    nested.echo(f"{processes.start(100, 101)}", "/A/B/cgroup.procs")
    assert nested.cat("/A/cgroup.procs") == "100\n"
    assert nested.cat("/A/cgroup.threads") == ""
    assert nested.cat("/A/B/cgroup.threads") == "100\n101\n"


def test_one_thread_moves_within_its_domain(nested, processes):
    nested.echo(f"{processes.start(100, 101)}", "/A/B/cgroup.procs")
    nested.echo("101", "/A/cgroup.threads")
    assert nested.cat("/A/cgroup.threads") == "101\n"
    assert nested.cat("/A/B/cgroup.threads") == "100\n"


def test_leader_moves_alone(nested, processes):
    nested.echo(f"{processes.start(100, 101)}", "/A/B/cgroup.procs")
    nested.echo("100", "/A/cgroup.threads")
    assert nested.cat("/A/cgroup.threads") == "100\n"
    assert nested.cat("/A/B/cgroup.threads") == "101\n"


def test_threads_come_home_with_the_process(nested, processes):
    nested.echo(f"{processes.start(100, 101)}", "/A/B/cgroup.procs")
    nested.echo("101", "/A/cgroup.threads")
    nested.echo("100", "/A/cgroup.procs")
    assert nested.cat("/A/cgroup.threads") == "100\n101\n"
    assert nested.cat("/A/B/cgroup.threads") == ""


def test_thread_to_another_domain_is_eopnotsupp(nested, processes, fails_with):
    nested.mkdir("/D")
    nested.echo(f"{processes.start(100)}", "/A/B/cgroup.procs")
    with fails_with("EOPNOTSUPP"):
        nested.echo("100", "/D/cgroup.threads")


def test_populated_cgroup_cannot_become_threaded(shell, processes, fails_with):
    shell.mkdir("/P")
    shell.echo(f"{processes.start(100)}", "/P/cgroup.procs")
    with fails_with("EOPNOTSUPP"):
        shell.echo("threaded", "/P/cgroup.type")


def test_empty_child_of_a_populated_cgroup_can(shell, processes):
    shell.mkdir("/P")
    shell.mkdir("/P/Q")
    shell.echo(f"{processes.start(100)}", "/P/cgroup.procs")
    shell.echo("threaded", "/P/Q/cgroup.type")
    assert shell.cat("/P/cgroup.type") == "domain threaded\n"


def test_cgroup_with_domain_controllers_below_cannot(shell, fails_with):
    shell.mkdir("/S")
    shell.mkdir("/S/t")
    shell.echo("+misc", "/cgroup.subtree_control")
    shell.echo("+misc", "/S/cgroup.subtree_control")
    with fails_with("EOPNOTSUPP"):
        shell.echo("threaded", "/S/t/cgroup.type")
    with fails_with("EOPNOTSUPP"):
        shell.echo("threaded", "/S/cgroup.type")


def test_enabling_below_a_thread_root_follows_its_place(nested, fails_with):
    nested.echo("+misc", "/cgroup.subtree_control")
    with fails_with("EOPNOTSUPP"):
        nested.echo("+misc", "/A/cgroup.subtree_control")
    with fails_with("ENOENT"):
        nested.echo("+misc", "/A/B/cgroup.subtree_control")
    with fails_with("ENOENT"):
        nested.echo("+misc", "/A/X/cgroup.subtree_control")


def test_threaded_child_of_the_root_loses_domain_controllers(shell):
    shell.mkdir("/t")
    shell.echo("+misc", "/cgroup.subtree_control")
    shell.echo("threaded", "/t/cgroup.type")
    assert shell.cat("/t/cgroup.controllers") == ""
    assert not shell.exists("/t/misc.max")


def test_removing_the_last_threaded_child_makes_a_plain_domain_again(nested, recorder):
    nested.rmdir("/A/B/C")
    nested.rmdir("/A/B")
    assert nested.cat("/A/cgroup.type") == "domain\n"
    assert ("/A", "cgroup.type") in recorder.of("changed")


def test_switching_tells_whose_type_changed(shell, recorder):
    for path in ("/A", "/A/B", "/A/X"):
        shell.mkdir(path)
    shell.echo("threaded", "/A/B/cgroup.type")
    assert recorder.of("changed") == [("/A", "cgroup.type"), ("/A/X", "cgroup.type")]


def test_kill_in_a_threaded_cgroup_is_judged_after_the_value(nested, fails_with):
    with fails_with("ERANGE"):
        nested.echo("2", "/A/B/cgroup.kill")
    with fails_with("EOPNOTSUPP"):
        nested.echo("1", "/A/B/cgroup.kill")


def test_invalid_domain_judges_the_pid_first(nested, processes, fails_with):
    with fails_with("EINVAL"):
        nested.echo("abc", "/A/X/cgroup.procs")
    with fails_with("ESRCH"):
        nested.echo("999", "/A/X/cgroup.procs")
