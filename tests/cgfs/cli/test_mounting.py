import json
import os
import subprocess
import time

import pytest

from cgfs.control.mountpoints import mount_at

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def succeeded(done):
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_mount_returns_once_mounted_and_umount_leaves_nothing(shell, fuse):
    succeeded(shell.cgfs("mount", "tree", "-o", "sev=10,sev_es=5"))
    tree = shell.home / "tree"
    assert (tree / "misc.capacity").read_text() == "sev 10\nsev_es 5\n"
    assert (tree / "encryption_ids.sev.stat").read_text() == "total 10\nused 0\n"
    succeeded(shell.cgfs("umount", "tree"))
    assert shell.leftovers() == []
    assert not tree.exists()


def test_directory_that_was_there_before_stays(shell, fuse):
    (shell.home / "tree").mkdir()
    succeeded(shell.cgfs("mount", "tree"))
    succeeded(shell.cgfs("umount", "tree"))
    assert (shell.home / "tree").exists()


def test_v1_mount_has_the_files_of_v1(shell, fuse):
    succeeded(shell.cgfs("mount", "tree", "-o", "v1,encryption_ids,sev=3"))
    tree = shell.home / "tree"
    (tree / "a").mkdir()
    assert {"tasks", "notify_on_release", "encryption_ids.sev.max"} <= set(os.listdir(tree / "a"))
    assert not (tree / "cgroup.controllers").exists()
    succeeded(shell.cgfs("umount", "tree"))


def test_times_of_the_root_and_its_files_are_that_of_the_mount(shell, fuse):
    before_ns = time.time_ns()
    succeeded(shell.cgfs("mount", "tree"))
    after_ns = time.time_ns()
    (shell.home / "tree/tenant").mkdir()
    root = (shell.home / "tree/cgroup.procs").stat()
    tenant = (shell.home / "tree/tenant").stat()
    succeeded(shell.cgfs("umount", "tree"))
    assert before_ns <= root.st_mtime_ns <= after_ns <= tenant.st_mtime_ns <= time.time_ns()


def test_resource_of_ones_own_is_counted_by_misc(shell, fuse):
    succeeded(shell.cgfs("mount", "tree", "-o", "misc,epc=7"))
    assert (shell.home / "tree/misc.capacity").read_text() == "epc 7\n"
    succeeded(shell.cgfs("umount", "tree"))


def test_tree_shows_a_cgroup_whose_name_is_not_utf8(shell, fuse):
    succeeded(shell.cgfs("mount", "tree"))
    (shell.home / "tree" / os.fsdecode(b"bad\xff")).mkdir()
    tree = json.loads(succeeded(shell.cgfs("tree", "tree", "--json")))
    succeeded(shell.cgfs("umount", "tree"))
    assert [child["path"] for child in tree["children"]] == [r"/bad\xff"]


def test_tree_shows_limits_and_members(shell, fuse):
    succeeded(shell.cgfs("mount", "tree", "-o", "misc,sev=10"))
    root = shell.home / "tree"
    (root / "cgroup.subtree_control").write_text("+misc")
    (root / "tenant").mkdir()
    (root / "tenant/misc.max").write_text("sev 2")
    sleeper = subprocess.Popen(["sleep", "60"])
    (root / "tenant/cgroup.procs").write_text(str(sleeper.pid))
    text = succeeded(shell.cgfs("tree", "tree"))
    tree = json.loads(succeeded(shell.cgfs("tree", "tree", "--json")))
    sleeper.kill()
    sleeper.wait()
    succeeded(shell.cgfs("umount", "tree"))
    assert "tenant  1 processes  misc.sev 0/2" in text
    [tenant] = tree["children"]
    assert (tenant["path"], tenant["procs"]) == ("/tenant", [sleeper.pid])
    assert tenant["files"]["misc.max"] == {"sev": "2"}


def test_exec_moves_itself_and_becomes_the_command(shell, fuse):
    succeeded(shell.cgfs("mount", "tree"))
    (shell.home / "tree/a").mkdir()
    command = "echo $$; cat tree/a/cgroup.procs; exit 5"
    done = shell.cgfs("exec", "-g", "/a", "--", "sh", "-c", command)
    missing = shell.cgfs("exec", "-g", "a", "--", "no-such-program")
    nowhere = shell.cgfs("exec", "-g", "/b", "--", "true")
    succeeded(shell.cgfs("umount", "tree"))
    own, *members = done.stdout.split()
    assert done.returncode == 5
    assert own in members
    assert (missing.returncode, missing.stderr.count("\n")) == (127, 1)
    assert (nowhere.returncode, "no cgroup /b" in nowhere.stderr) == (os.EX_UNAVAILABLE, True)


def test_umount_while_in_use_names_the_user_and_works(shell, fuse):
    succeeded(shell.cgfs("mount", "tree"))
    inside = subprocess.Popen(["sleep", "60"], cwd=shell.home / "tree")
    done = shell.cgfs("umount", "tree")
    inside.kill()
    inside.wait()
    assert done.returncode == 0
    assert f"still in use by sleep (pid {inside.pid})" in done.stderr


def test_umount_of_a_host_is_left_to_kvmsim(shell):
    done = shell.cgfs("umount", "/proc")
    assert (done.returncode, done.stderr) == (69, "cgfs: /proc: no cgfs is mounted here\n")


def test_unknown_mount_option_mounts_nothing(shell, fuse):
    done = shell.cgfs("mount", "tree", "-o", "cpu")
    assert (done.returncode, done.stderr.count("\n")) == (os.EX_USAGE, 1)
    assert not (shell.home / "tree").exists()


def test_foreground_server_ends_at_a_signal(shell, fuse):
    server = subprocess.Popen(
        ["cgfs", "mount", "--foreground", "tree"],
        cwd=shell.home,
        env=shell.environment,
        stderr=subprocess.PIPE,
    )
    tree = shell.home / "tree"
    while mount_at(tree) is None or not list(shell.runtime.glob("*.json")):
        assert server.poll() is None
    server.terminate()
    _, log = server.communicate(timeout=20)
    assert server.returncode == 0
    assert b"SIGTERM" in log
    assert not tree.exists()


MOUNT_8 = """
set -e
{helper}
mount -t fuse.cgfs lab "$HOME/tree" -o {options}
cat "$HOME/tree/misc.capacity"
grep " $HOME/tree " /proc/self/mounts
umount "$HOME/tree"
"""
# In a private mount namespace the machine's own helpers are not touched.
OWN_HELPER = 'mkdir sbin; ln -s "$(command -v cgfs)" sbin/mount.fuse.cgfs; mount --bind sbin /sbin'
# mount(8) clears PATH, so what libfuse's helper calls is found in the system's directories only.
FOUND_IN_PATH = 'mkdir bin; cp "$(command -v cgfs)" bin; mount --bind bin /usr/local/sbin'


def wait_ended(shell):
    for _ in range(200):
        if not shell.processes():
            return
        subprocess.run(["sleep", "0.05"], check=True)


@as_root
@pytest.mark.parametrize("helper", [OWN_HELPER, FOUND_IN_PATH])
def test_mount_8_mounts_a_tree(shell, fuse, helper):
    (shell.home / "tree").mkdir()
    script = MOUNT_8.format(helper=helper, options="misc,sev=4")
    done = shell.run("unshare", "-m", "sh", "-c", script)
    wait_ended(shell)
    capacity, mount = succeeded(done).splitlines()
    assert capacity == "sev 4"
    assert mount.startswith(f"lab {shell.home}/tree fuse.cgfs rw,")
    assert shell.leftovers() == []


@as_root
def test_line_of_fstab_mounts_a_tree(shell, fuse):
    tree = shell.home / "tree"
    tree.mkdir()
    fstab = shell.home / "fstab"
    fstab.write_text(f"lab {tree} fuse.cgfs noauto,v1,encryption_ids,sev=3,nofail,x-test 0 0\n")
    script = f'{OWN_HELPER}; mount -T fstab "$HOME/tree"; ls "$HOME/tree"; umount "$HOME/tree"'
    done = shell.run("unshare", "-m", "sh", "-ec", script)
    wait_ended(shell)
    assert "tasks" in succeeded(done).split()
    assert shell.leftovers() == []


@as_root
def test_mount_8_tells_what_is_wrong_with_its_options(shell, fuse):
    (shell.home / "tree").mkdir()
    script = MOUNT_8.format(helper=OWN_HELPER, options="cpu")
    done = shell.run("unshare", "-m", "sh", "-c", script)
    assert "cgfs: mount options: unknown option 'cpu'" in done.stderr
    assert done.returncode != 0
    assert shell.leftovers() == []


@as_root
def test_mount_8_can_start_a_whole_host(shell, fuse):
    (shell.home / "tree").mkdir()
    script = f"""{OWN_HELPER}
mount -t fuse.cgfs lab "$HOME/tree" -o preset=lab-amd,seed=3
cat "$HOME/tree/sys/fs/cgroup/misc.capacity"
kvmsim down "$HOME/tree"
"""
    done = shell.run("unshare", "-m", "sh", "-ec", script)
    assert succeeded(done) == "sev 10\nsev_es 5\n"
    assert shell.leftovers() == []


ORDINARY_USER = """
cgfs mount tree -o misc,sev=4
echo +misc > tree/cgroup.subtree_control
mkdir tree/mine; echo "sev 1" > tree/mine/misc.max; cat tree/mine/misc.max
echo $$ > tree/mine/cgroup.procs; test "$(head -n 1 tree/mine/cgroup.procs)" = $$
echo $$ > tree/cgroup.procs; rmdir tree/mine
grep "/tree fuse.cgfs " /proc/self/mounts | grep -c user_id=65534
cgfs umount tree
"""


@as_root
def test_ordinary_user_mounts_and_manages_a_tree(ordinary, fuse):
    done = ordinary.run("sh", "-ec", ORDINARY_USER)
    assert succeeded(done) == "sev 1\n1\n"
    assert ordinary.leftovers() == []


@as_root
def test_ordinary_user_without_permission_for_the_device_is_told(ordinary, fuse):
    ordinary.open_device = False
    done = ordinary.run("cgfs", "mount", "tree")
    line = "cgfs: no permission to open /dev/fuse\n"
    assert (done.returncode, done.stderr) == (os.EX_NOPERM, line)
    assert ordinary.leftovers() == []
