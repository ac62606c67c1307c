"""mkdir, rmdir, limits and what a removed cgroup leaves (spec C.3, C.4, F.1, F.6)."""

import stat

import pytest

from cgfs.core.caller import Caller
from cgfs.core.node import DIRECTORY


def test_mkdir_existing_name_is_eexist(shell, fails_with):
    shell.mkdir("/a")
    with fails_with("EEXIST"):
        shell.mkdir("/a")


@pytest.mark.parametrize("name", ["cgroup.procs", "cgroup.events"])
def test_mkdir_name_of_a_control_file_is_eexist(shell, fails_with, name):
    shell.mkdir("/a")
    with fails_with("EEXIST"):
        shell.mkdir(f"/a/{name}")


@pytest.mark.parametrize(
    "name",
    ["a.b", "cgroup.foo", "tasks", ".hidden", "...", " ", "a b", "a:b", "misc.max", "\udcff"],
)
def test_mkdir_takes_odd_names(shell, name):
    shell.mkdir("/a")
    assert shell.mkdir(f"/a/{name}").path == f"/a/{name}"


def test_mkdir_newline_is_einval_even_at_the_limit(shell, fails_with):
    shell.echo("0", "/cgroup.max.descendants")
    with fails_with("EINVAL"):
        shell.mkdir("/a\nb")


def test_mkdir_existing_name_is_eexist_even_at_the_limit(shell, fails_with):
    shell.mkdir("/a")
    shell.echo("0", "/cgroup.max.descendants")
    with fails_with("EEXIST"):
        shell.mkdir("/a")


def test_mkdir_in_a_removed_cgroup_is_enoent(roots, shell, fails_with):
    gone = shell.mkdir("/a")
    shell.rmdir("/a")
    with fails_with("ENOENT"):
        roots.v2.mkdir(gone, "b")


def test_mkdir_over_max_descendants_counts_the_whole_subtree(shell, fails_with):
    shell.mkdir("/d")
    shell.echo("1", "/d/cgroup.max.descendants")
    shell.mkdir("/d/a")
    with fails_with("EAGAIN"):
        shell.mkdir("/d/a/b")


def test_mkdir_over_max_depth_is_eagain(shell, fails_with):
    shell.mkdir("/d")
    shell.echo("1", "/d/cgroup.max.depth")
    shell.mkdir("/d/a")
    with fails_with("EAGAIN"):
        shell.mkdir("/d/a/b")


def test_max_depth_zero_forbids_children(shell, fails_with):
    shell.mkdir("/d")
    shell.echo("0", "/d/cgroup.max.depth")
    with fails_with("EAGAIN"):
        shell.mkdir("/d/a")


def test_removed_children_do_not_count_against_max_descendants(shell):
    shell.mkdir("/d")
    shell.echo("1", "/d/cgroup.max.descendants")
    shell.mkdir("/d/a")
    shell.rmdir("/d/a")
    assert shell.mkdir("/d/b").path == "/d/b"


def test_mkdir_belongs_to_the_caller(shell):
    cgrp = shell.mkdir("/d", Caller(7, 8, 1))
    assert (cgrp.owner(DIRECTORY), cgrp.owner(1)) == ((7, 8), (7, 8))


def test_mkdir_in_a_setgid_directory_takes_its_group(shell):
    parent = shell.mkdir("/d")
    parent.own_attributes(DIRECTORY).mode = 0o2755
    parent.own_attributes(DIRECTORY).gid = 65534
    child = shell.mkdir("/d/a")
    assert child.owner(DIRECTORY) == (0, 65534)
    assert child.mode(DIRECTORY) == stat.S_ISGID | 0o755
    assert child.owner(1) == (0, 65534)


def test_rmdir_with_children_is_ebusy(shell, fails_with):
    shell.mkdir("/d")
    shell.mkdir("/d/a")
    with fails_with("EBUSY"):
        shell.rmdir("/d")


def test_rmdir_with_a_process_is_ebusy(shell, processes, fails_with):
    shell.mkdir("/d")
    shell.echo(f"{processes.start(100)}", "/d/cgroup.procs")
    with fails_with("EBUSY"):
        shell.rmdir("/d")


def test_rmdir_of_the_root_is_ebusy(roots, fails_with):
    with fails_with("EBUSY"):
        roots.v2.rmdir(roots.v2.root)


def test_cgroup_made_again_has_another_id(shell):
    first = shell.mkdir("/d").id
    shell.rmdir("/d")
    assert shell.mkdir("/d").id != first


def test_find_missing_names_the_path(roots, fails_with):
    with fails_with("ENOENT") as caught:
        roots.v2.find("/no/such")
    assert str(caught.value) == "cgroup /no/such does not exist"


def test_stat_counts_live_cgroups_per_controller(shell):
    shell.echo("+misc", "/cgroup.subtree_control")
    shell.mkdir("/d")
    shell.mkdir("/d/a")
    assert shell.cat("/cgroup.stat").splitlines()[:3] == [
        "nr_descendants 2",
        "nr_subsys_encryption_ids 1",
        "nr_subsys_misc 2",
    ]


def test_stat_counts_a_removed_cgroup_as_dying_while_charged(roots, shell):
    shell.echo("+misc", "/cgroup.subtree_control")
    css = shell.mkdir("/d").css["misc"]
    css.try_charge("sev")
    shell.rmdir("/d")
    assert "nr_dying_descendants 1\n" in shell.cat("/cgroup.stat")
    assert "nr_dying_subsys_misc 1\n" in shell.cat("/cgroup.stat")
    css.uncharge("sev")
    assert "nr_dying_descendants 0\n" in shell.cat("/cgroup.stat")
    assert "nr_dying_subsys_misc 0\n" in shell.cat("/cgroup.stat")


def test_rmdir_without_charges_leaves_nothing_dying(shell):
    shell.echo("+misc +encryption_ids", "/cgroup.subtree_control")
    shell.mkdir("/d")
    shell.rmdir("/d")
    assert "nr_dying_descendants 0\n" in shell.cat("/cgroup.stat")


def test_removed_parent_of_a_dying_cgroup_is_dying_too(roots, shell):
    shell.echo("+misc", "/cgroup.subtree_control")
    shell.mkdir("/d")
    shell.echo("+misc", "/d/cgroup.subtree_control")
    css = shell.mkdir("/d/a").css["misc"]
    css.try_charge("sev")
    shell.rmdir("/d/a")
    shell.rmdir("/d")
    assert "nr_dying_descendants 2\n" in shell.cat("/cgroup.stat")
    assert "nr_dying_subsys_misc 2\n" in shell.cat("/cgroup.stat")
    css.uncharge("sev")
    assert "nr_dying_descendants 0\n" in shell.cat("/cgroup.stat")
    assert "nr_dying_subsys_misc 0\n" in shell.cat("/cgroup.stat")


def test_stat_counts_dying_state_of_a_controller_that_is_off_here(shell):
    shell.echo("+misc", "/cgroup.subtree_control")
    css = shell.mkdir("/d").css["misc"]
    css.try_charge("sev")
    shell.echo("-misc", "/cgroup.subtree_control")
    assert "nr_subsys_misc 0\n" in shell.cat("/d/cgroup.stat")
    assert "nr_dying_subsys_misc 1\n" in shell.cat("/d/cgroup.stat")
    shell.echo("+misc", "/cgroup.subtree_control")
    assert "nr_subsys_misc 1\n" in shell.cat("/d/cgroup.stat")
    assert "nr_dying_subsys_misc 1\n" in shell.cat("/d/cgroup.stat")
    css.uncharge("sev")
    assert "nr_dying_subsys_misc 0\n" in shell.cat("/d/cgroup.stat")


def test_removed_cgroup_that_no_view_shows_is_dropped(roots, shell):
    shell.echo("+misc", "/cgroup.subtree_control")
    before = set(roots.nodes)
    shell.mkdir("/d")
    shell.rmdir("/d")
    assert set(roots.nodes) == before
