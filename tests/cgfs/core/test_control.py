"""cgroup.subtree_control (spec C.3, F.5)."""

import pytest


@pytest.fixture
def nested(shell):
    for path in ("/d", "/d/c", "/d/c/g"):
        shell.mkdir(path)
    return shell


def test_enable_without_the_parent_is_enoent(nested, fails_with):
    with fails_with("ENOENT"):
        nested.echo("+misc", "/d/cgroup.subtree_control")


def test_disable_what_is_not_available_succeeds(nested):
    nested.echo("-misc", "/d/cgroup.subtree_control")
    assert nested.cat("/d/cgroup.subtree_control") == ""


def test_enable_shows_files_one_level_down_only(nested):
    nested.echo("+misc", "/cgroup.subtree_control")
    assert nested.exists("/d/misc.max")
    assert not nested.exists("/d/c/misc.max")


def test_controllers_follow_the_parent(nested):
    nested.echo("+misc", "/cgroup.subtree_control")
    assert nested.cat("/d/cgroup.controllers") == "misc\n"
    assert nested.cat("/d/c/cgroup.controllers") == ""


def test_names_print_in_controller_order(nested):
    nested.echo("+misc +encryption_ids", "/cgroup.subtree_control")
    assert nested.cat("/cgroup.subtree_control") == "encryption_ids misc\n"


@pytest.mark.parametrize("text", ["\n", " ", "  \t"])
def test_white_space_is_a_no_op(nested, text):
    nested.echo(text, "/cgroup.subtree_control")
    assert nested.cat("/cgroup.subtree_control") == ""


@pytest.mark.parametrize(
    "text",
    [
        "misc",
        "+bogus",
        "-bogus",
        "+misc +bogus",
        "+",
        "-",
        "*misc",
        "++misc",
        "+misc,",
        "+MISC",
        "+misc\t-misc",
        "+misc\n+misc",
        "+debug",
    ],
)
def test_bad_word_is_einval_and_applies_nothing(nested, fails_with, text):
    with fails_with("EINVAL"):
        nested.echo(text, "/cgroup.subtree_control")
    assert nested.cat("/cgroup.subtree_control") == ""


@pytest.mark.parametrize("name", ["memory", "cpu", "pids", "perf_event"])
def test_controller_of_linux_that_no_host_has_is_enoent(nested, fails_with, name):
    with fails_with("ENOENT"):
        nested.echo(f"+{name}", "/cgroup.subtree_control")


def test_disable_of_such_a_controller_succeeds(nested):
    nested.echo("-memory", "/cgroup.subtree_control")
    assert nested.cat("/cgroup.subtree_control") == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [("+misc  -misc", ""), ("-misc +misc", "misc\n"), ("+misc\0zz", "misc\n")],
)
def test_the_last_word_for_a_controller_counts(nested, text, shown):
    nested.echo(text, "/cgroup.subtree_control")
    assert nested.cat("/cgroup.subtree_control") == shown


def test_disable_while_a_child_has_it_enabled_is_ebusy(nested, fails_with):
    nested.echo("+misc", "/cgroup.subtree_control")
    nested.echo("+misc", "/d/cgroup.subtree_control")
    with fails_with("EBUSY"):
        nested.echo("-misc", "/cgroup.subtree_control")


def test_enable_with_a_process_inside_is_ebusy(nested, processes, fails_with):
    nested.echo("+misc", "/cgroup.subtree_control")
    nested.echo(f"{processes.start(100)}", "/d/cgroup.procs")
    with fails_with("EBUSY"):
        nested.echo("+misc", "/d/cgroup.subtree_control")


def test_enable_and_disable_in_one_write_ignores_processes(nested, processes):
    nested.echo("+misc", "/cgroup.subtree_control")
    nested.echo(f"{processes.start(100)}", "/d/cgroup.procs")
    nested.echo("+misc -misc", "/d/cgroup.subtree_control")
    assert nested.cat("/d/cgroup.subtree_control") == ""


def test_enable_with_a_process_further_down_succeeds(nested, processes):
    nested.echo("+misc", "/cgroup.subtree_control")
    nested.echo(f"{processes.start(100)}", "/d/c/cgroup.procs")
    nested.echo("+misc", "/d/cgroup.subtree_control")
    assert nested.exists("/d/c/misc.max")


def test_enable_over_a_directory_of_a_file_name_is_eexist(nested, fails_with):
    nested.mkdir("/d/c/misc.max")
    nested.echo("+misc", "/cgroup.subtree_control")
    with fails_with("EEXIST"):
        nested.echo("+misc", "/d/cgroup.subtree_control")
    assert nested.cat("/d/cgroup.subtree_control") == ""


def test_enable_again_gives_fresh_state(nested):
    nested.echo("+misc", "/cgroup.subtree_control")
    nested.echo("sev 2", "/d/misc.max")
    nested.echo("-misc", "/cgroup.subtree_control")
    nested.echo("+misc", "/cgroup.subtree_control")
    assert nested.cat("/d/misc.max") == "sev max\n"


def test_files_belong_to_who_enabled_them(nested, user):
    nested.file("/cgroup.subtree_control")[0].own_attributes(0).mode = 0o777
    nested.echo("+misc", "/cgroup.subtree_control", user)
    assert nested.file("/d/misc.max")[0].owner(1) == (65534, 65534)


def test_enabling_tells_which_files_changed(nested, recorder):
    nested.echo("+misc", "/cgroup.subtree_control")
    assert recorder.of("appeared") == [("/d", "misc")]
    assert recorder.of("changed") == [("/d", "cgroup.controllers")]
