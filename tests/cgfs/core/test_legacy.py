"""The v1 view (spec D)."""

import pytest

from cgfs.core.caller import Caller
from cgfs.core.tasks import FIRST_EMULATED_PID


@pytest.fixture
def v1(roots, make_shell):
    return make_shell(roots, roots.mount_v1(["encryption_ids"]))


def test_every_cgroup_has_every_controller(v1):
    v1.mkdir("/a")
    v1.mkdir("/a/b")
    assert v1.cat("/a/b/encryption_ids.sev.max") == "max\n"
    assert v1.cat("/encryption_ids.sev.stat") == "total 4\nused 0\n"


def test_v2_files_do_not_exist(v1):
    v1.mkdir("/a")
    assert not v1.exists("/a/cgroup.events")
    assert not v1.exists("/cgroup.subtree_control")


def test_controller_left_v2(v1, shell, fails_with):
    assert shell.cat("/cgroup.controllers") == "misc\n"
    assert not shell.exists("/encryption_ids.sev.stat")
    with fails_with("ENOENT"):
        shell.echo("+encryption_ids", "/cgroup.subtree_control")
    shell.echo("-encryption_ids", "/cgroup.subtree_control")


def test_same_controllers_give_the_same_hierarchy(roots, v1):
    assert roots.mount_v1(["encryption_ids"]) is v1.hierarchy


def test_controller_in_another_v1_hierarchy_is_ebusy(roots, v1, fails_with):
    with fails_with("EBUSY"):
        roots.mount_v1(["encryption_ids", "misc"])


def test_controller_in_use_in_v2_is_ebusy(roots, shell, fails_with):
    shell.mkdir("/a")
    shell.echo("+misc", "/cgroup.subtree_control")
    with fails_with("EBUSY"):
        roots.mount_v1(["misc"])


def test_controller_pinned_by_a_removed_v2_cgroup_is_ebusy(roots, shell, fails_with):
    shell.echo("+misc", "/cgroup.subtree_control")
    css = shell.mkdir("/a").css["misc"]
    css.try_charge("sev")
    shell.rmdir("/a")
    with fails_with("EBUSY"):
        roots.mount_v1(["misc"])
    css.uncharge("sev")
    assert roots.mount_v1(["misc"]).version == 1


@pytest.mark.parametrize(("controllers", "name"), [(["bogus"], ""), ([], ""), ([], "a b")])
def test_bad_mount_options_are_einval(roots, fails_with, controllers, name):
    with fails_with("EINVAL"):
        roots.mount_v1(controllers, name)


def test_unmount_gives_the_controllers_back(roots, v1, shell):
    roots.unmount_v1(v1.hierarchy)
    assert shell.cat("/cgroup.controllers") == "encryption_ids misc\n"


def test_unmount_with_children_keeps_them(roots, v1):
    v1.mkdir("/a")
    roots.unmount_v1(v1.hierarchy)
    assert roots.mount_v1(["encryption_ids"]).find("/a").path == "/a"


def test_charge_follows_the_task_in_this_hierarchy(roots, v1, processes):
    v1.mkdir("/a")
    v1.echo(f"{processes.start(100)}", "/a/cgroup.procs")
    roots.css_of(100, "encryption_ids").try_charge("sev")
    assert v1.cat("/a/encryption_ids.sev.current") == "1\n"
    assert roots.css_of(100, "misc").cgrp.is_root


def test_lists_ascend(v1, processes):
    v1.mkdir("/a")
    v1.echo(f"{processes.start(300)}", "/a/cgroup.procs")
    v1.echo(f"{processes.start(100, 101)}", "/a/cgroup.procs")
    assert v1.cat("/a/cgroup.procs") == "100\n300\n"
    assert v1.cat("/a/tasks") == "100\n101\n300\n"


def test_process_with_threads_in_two_cgroups_is_in_procs_of_each(v1, processes):
    v1.mkdir("/a")
    v1.echo(f"{processes.start(100, 101)}", "/a/cgroup.procs")
    v1.mkdir("/b")
    v1.echo("101", "/b/tasks")
    assert (v1.cat("/a/tasks"), v1.cat("/b/tasks")) == ("100\n", "101\n")
    assert (v1.cat("/a/cgroup.procs"), v1.cat("/b/cgroup.procs")) == ("100\n", "100\n")


def test_invisible_processes_are_skipped(v1, processes):
    v1.mkdir("/a")
    v1.echo(f"{processes.start(100)}", "/a/cgroup.procs")
    processes.invisible.add(100)
    assert v1.cat("/a/cgroup.procs") == ""


def test_moving_needs_the_targets_uid_not_the_ancestor(v1, processes, user, fails_with):
    v1.mkdir("/a")
    processes.start(100)
    with fails_with("EACCES"):
        v1.echo("100", "/a/cgroup.procs", user)
    processes.uids[100] = user.uid
    v1.echo("100", "/a/cgroup.procs", user)
    assert v1.cat("/a/cgroup.procs") == "100\n"


@pytest.mark.parametrize("name", ["notify_on_release", "cgroup.clone_children"])
@pytest.mark.parametrize(
    ("text", "shown"), [("1", "1\n"), ("1\n", "1\n"), ("0x1", "1\n"), ("7", "1\n"), ("0", "0\n")]
)
def test_flags_take_numbers(v1, name, text, shown):
    v1.mkdir("/a")
    v1.echo(text, f"/a/{name}")
    assert v1.cat(f"/a/{name}") == shown


@pytest.mark.parametrize(
    ("text", "errno"), [(" 1", "EINVAL"), ("1 ", "EINVAL"), ("9" * 20, "ERANGE")]
)
def test_flags_are_not_stripped(v1, fails_with, text, errno):
    v1.mkdir("/a")
    with fails_with(errno):
        v1.echo(text, "/a/notify_on_release")


def test_flags_are_inherited(v1):
    v1.echo("1", "/notify_on_release")
    v1.mkdir("/a")
    assert v1.cat("/a/notify_on_release") == "1\n"
    assert v1.cat("/a/cgroup.clone_children") == "0\n"


def test_release_agent_needs_privilege(v1, user, fails_with):
    with fails_with("EPERM"):
        v1.echo("/bin/true", "/release_agent", user)


def test_release_agent_is_stripped_and_cleared(v1):
    assert v1.cat("/release_agent") == "\n"
    v1.echo(" /bin/agent \n", "/release_agent")
    assert v1.cat("/release_agent") == "/bin/agent\n"
    v1.echo(" ", "/release_agent")
    assert v1.cat("/release_agent") == "\n"


def test_release_runs_when_the_last_process_leaves(roots, v1, processes):
    released = []
    roots.release = lambda agent, path: released.append((agent, path))
    v1.echo("/agent", "/release_agent")
    v1.mkdir("/a")
    v1.echo("1", "/a/notify_on_release")
    v1.echo(f"{processes.start(100)}", "/a/cgroup.procs")
    processes.zombies.add(100)
    roots.tasks.exited(100, 100, 0)
    assert released == [("/agent", "/a")]


def test_release_runs_when_the_last_child_goes(roots, v1):
    released = []
    roots.release = lambda agent, path: released.append(path)
    v1.echo("/agent", "/release_agent")
    v1.mkdir("/a")
    v1.echo("1", "/a/notify_on_release")
    v1.mkdir("/a/b")
    v1.rmdir("/a/b")
    assert released == ["/a"]


def test_rename_keeps_the_cgroup_and_its_place(v1):
    cgrp = v1.mkdir("/a")
    v1.mkdir("/z")
    v1.hierarchy.rename(cgrp, v1.hierarchy.root, "b")
    assert cgrp.path == "/b"
    assert list(v1.hierarchy.root.children) == ["b", "z"]


def test_rename_refusals(v1, fails_with):
    cgrp, other = v1.mkdir("/a"), v1.mkdir("/z")
    with fails_with("EIO"):
        v1.hierarchy.rename(cgrp, other, "b")
    with fails_with("EEXIST"):
        v1.hierarchy.rename(cgrp, v1.hierarchy.root, "z")
    with fails_with("EINVAL"):
        v1.hierarchy.rename(cgrp, v1.hierarchy.root, "b\n")


def test_rename_in_v2_is_eperm(roots, shell, fails_with):
    cgrp = shell.mkdir("/a")
    with fails_with("EPERM"):
        roots.v2.rename(cgrp, roots.v2.root, "b")


def test_emulated_processes_are_in_the_root_of_every_hierarchy(roots, shell, v1, owner):
    roots.spawn(shell.mkdir("/a"), owner)
    assert v1.cat("/cgroup.procs", Caller(0, 0, 1)) == f"{FIRST_EMULATED_PID}\n"


def test_release_does_not_run_for_a_cgroup_its_threads_process_joins(roots, v1, processes):
    released = []
    roots.release = lambda agent, path: released.append(path)
    v1.echo("/agent", "/release_agent")
    v1.mkdir("/a")
    v1.echo("1", "/a/notify_on_release")
    processes.start(100, 101)
    v1.echo("101", "/a/tasks")
    v1.echo("100", "/a/cgroup.procs")
    assert released == []


def test_root_lists_no_thread_that_is_elsewhere(v1, processes):
    processes.start(100, 101, 102)
    v1.mkdir("/a")
    v1.echo("101", "/a/tasks")
    assert v1.cat("/tasks") == "100\n102\n"
    assert v1.cat("/a/tasks") == "101\n"


def test_leader_that_exited_does_not_move_by_its_own_number(v1, processes):
    processes.start(100, 101)
    v1.mkdir("/a")
    v1.mkdir("/b")
    v1.echo("100", "/a/cgroup.procs")
    processes.table[100] = [101]
    v1.echo("100", "/b/tasks")
    assert v1.cat("/a/tasks") == "101\n"
    assert v1.cat("/b/cgroup.procs") == ""


def test_controllers_alone_find_a_named_hierarchy(roots):
    named = roots.mount_v1(["misc"], "x")
    assert roots.mount_v1(["misc"]) is named


def test_name_alone_finds_a_hierarchy_with_controllers(roots):
    named = roots.mount_v1(["misc"], "x")
    assert roots.mount_v1([], "x") is named


def test_name_of_a_hierarchy_with_other_controllers_is_ebusy(roots, fails_with):
    roots.mount_v1(["misc"], "x")
    with fails_with("EBUSY"):
        roots.mount_v1(["encryption_ids"], "x")


def test_unmount_with_a_dying_child_keeps_the_hierarchy(roots, v1):
    css = v1.mkdir("/a").css["encryption_ids"]
    css.try_charge("sev")
    v1.rmdir("/a")
    roots.unmount_v1(v1.hierarchy)
    assert roots.mount_v1(["encryption_ids"]) is v1.hierarchy
    css.uncharge("sev")
    roots.unmount_v1(v1.hierarchy)
    assert "encryption_ids" in roots.v2.controllers


def test_taking_a_controller_from_v2_changes_its_lists(roots, shell, recorder):
    shell.echo("+misc", "/cgroup.subtree_control")
    hierarchy = roots.mount_v1(["misc"])
    assert recorder.of("changed") == [
        ("/", "cgroup.controllers"),
        ("/", "cgroup.subtree_control"),
    ]
    recorder.heard.clear()
    roots.unmount_v1(hierarchy)
    assert recorder.of("changed") == [("/", "cgroup.controllers")]
