"""What a mounted host does beyond the first session."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sessions.session import OrdinaryShell

from cgfs.control.mountpoints import mount_at


def succeeded(done):
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def vm(shell, name):
    return json.loads(succeeded(shell.kvmsim("vm", "show", name, "--json")))


@pytest.fixture
def tenant(host):
    """A cgroup with every controller."""
    cgroup = host / "sys/fs/cgroup"
    (cgroup / "cgroup.subtree_control").write_text("+encryption_ids +misc +bus_lock")
    (cgroup / "tenant").mkdir()
    return cgroup / "tenant"


def test_info_shows_machine_use_and_server(shell, host):
    succeeded(shell.kvmsim("vm", "start", "a", "--type", "sev"))
    info = json.loads(succeeded(shell.kvmsim("info", "--json")))
    assert info["resources"]["sev"] == {"capacity": 10, "used": 1}
    assert (info["preset"], info["vms"], info["seed"]) == ("lab-amd", 1, 1)
    assert (info["directory"], info["pid"]) == (str(host), shell.server())
    assert info["uptime_ns"] > 0
    text = succeeded(shell.kvmsim("info"))
    assert "sev 1/10, sev_es 0/5" in text
    assert info["process_tracking"] in text


def test_list_and_show_for_people(shell, host):
    succeeded(shell.kvmsim("vm", "start", "a", "--type", "sev", "--vcpus", "2"))
    heading, row = succeeded(shell.kvmsim("vm", "list")).splitlines()
    assert heading.split()[:3] == ["NAME", "TYPE", "STATE"]
    assert row.split()[:4] == ["a", "sev", "running", "/"]
    assert "vcpu 1" in succeeded(shell.kvmsim("vm", "show", "a"))


def test_presets_are_listed(shell):
    names = [row["name"] for row in json.loads(succeeded(shell.kvmsim("presets", "--json")))]
    assert {"lab-amd", "milan509-es99", "tdx31"} <= set(names)
    assert succeeded(shell.kvmsim("presets")).count("\n") == len(names)


def test_vm_starts_in_the_cgroup_of_its_caller(shell, host, tenant):
    script = "echo $$ > $0/cgroup.procs; kvmsim vm start a"
    succeeded(shell.run("sh", "-c", script, tenant))
    assert vm(shell, "a")["cgroup"] == "/tenant"


def test_vm_moves_by_its_pid_like_any_process(shell, host, tenant):
    succeeded(shell.kvmsim("vm", "start", "a", "--type", "sev", "--cgroup", "/"))
    pid = vm(shell, "a")["pid"]
    (tenant / "cgroup.procs").write_text(str(pid))
    assert (tenant / "cgroup.procs").read_text() == f"{pid}\n"
    assert vm(shell, "a")["cgroup"] == "/tenant"
    assert (tenant / "misc.current").read_text() == "sev 0\nsev_es 0\n"


def test_cgroup_kill_ends_vms_and_real_processes(shell, host, tenant):
    succeeded(shell.kvmsim("vm", "start", "a", "--type", "sev", "--cgroup", "/tenant"))
    sleeper = subprocess.Popen(["sleep", "60"])
    (tenant / "cgroup.procs").write_text(str(sleeper.pid))
    (tenant / "cgroup.kill").write_text("1")
    assert sleeper.wait(10) == -9
    assert json.loads(succeeded(shell.kvmsim("vm", "list", "--json"))) == []
    deadline = time.monotonic() + 5
    while "populated 1" in (tenant / "cgroup.events").read_text():
        assert time.monotonic() < deadline
    tenant.rmdir()


def test_ratelimit_of_the_vmm_slows_its_vm(shell, host):
    options = ("--guest", "buslock rate=5000", "--bus-lock-ratelimit", "50")
    succeeded(shell.kvmsim("vm", "start", "a", *options))
    time.sleep(1)
    a = vm(shell, "a")
    assert a["bus_locks"] <= 50 * (a["uptime_ns"] // 10**9 + 1)
    assert a["bus_lock_exits"] > 0


def test_host_and_its_vms_start_from_a_command_with_closed_streams(shell, fuse):
    script = "kvmsim up host <&- >&- 2>&- && kvmsim vm start a <&- >&- 2>&-"
    succeeded(shell.run("sh", "-c", script))
    assert vm(shell, "a")["state"] == "running"
    succeeded(shell.kvmsim("down", "host"))
    assert shell.leftovers() == []


def test_vm_in_a_cgroup_whose_name_is_not_utf8_is_shown(shell, host):
    succeeded(shell.kvmsim("vm", "start", "a"))
    odd = host / "sys/fs/cgroup" / os.fsdecode(b"bad\xff")
    odd.mkdir()
    (odd / "cgroup.procs").write_text(str(vm(shell, "a")["pid"]))
    assert vm(shell, "a")["cgroup"] == r"/bad\xff"
    assert r"/bad\xff" in succeeded(shell.kvmsim("vm", "list"))


def test_chosen_controllers_are_all_there_is(shell, fuse):
    arguments = ("up", "host", "--preset", "lab-amd", "--controllers", "misc")
    succeeded(shell.kvmsim(*arguments))
    cgroup = shell.home / "host/sys/fs/cgroup"
    assert (cgroup / "cgroup.controllers").read_text() == "misc\n"
    assert not (cgroup / "encryption_ids.sev.stat").exists()
    succeeded(shell.kvmsim("vm", "start", "a", "--type", "sev"))
    succeeded(shell.kvmsim("down", "host"))


def test_preset_of_ones_own_is_read_from_where_the_user_is(shell, fuse):
    (shell.home / "mine.toml").write_text('vendor = "amd"\n[misc]\nepc = 7\n')
    succeeded(shell.kvmsim("up", "host", "--preset", "./mine.toml"))
    cgroup = shell.home / "host/sys/fs/cgroup"
    assert (cgroup / "misc.capacity").read_text() == "epc 7\n"
    preset = json.loads(succeeded(shell.kvmsim("info", "--json")))["preset"]
    succeeded(shell.kvmsim("down", "host"))
    assert preset == str(shell.home / "mine.toml")


def test_mount_says_that_it_is_emulated(shell, host):
    mount = mount_at(host)
    assert (mount.fstype, mount.source) == ("fuse.kvmsim", "lab-amd")
    assert "Nothing here is hardware" in (host / "EMULATED").read_text()


def test_tree_and_exec_of_cgfs_work_on_a_host(shell, host, tenant):
    succeeded(shell.kvmsim("vm", "start", "a", "--type", "sev", "--cgroup", "/tenant"))
    assert "tenant  1 process" in succeeded(shell.cgfs("tree", host))
    done = shell.cgfs(
        "exec", "-g", "/tenant", "--", "sh", "-c", "echo $$; cat $0/cgroup.procs", tenant
    )
    own, *members = succeeded(done).split()
    assert own in members


def test_foreground_host_logs_and_ends_at_ctrl_c(shell, fuse):
    server = subprocess.Popen(
        ["kvmsim", "up", "host", "--preset", "lab-amd", "--foreground"],
        cwd=shell.home,
        env=shell.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(shell.runtime.glob("*.json")):
        assert server.poll() is None
        time.sleep(0.01)
    succeeded(shell.kvmsim("vm", "start", "a"))
    server.send_signal(2)
    _, log = server.communicate(timeout=20)
    assert server.returncode == 0
    assert "vm a started in cgroup /" in log
    assert "Traceback" not in log
    assert not (shell.home / "host").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="a symbolic link in /sbin needs root")
def test_line_of_fstab_starts_a_host(shell, fuse):
    host = shell.home / "host"
    host.mkdir()
    (shell.home / "fstab").write_text(f"lab-amd {host} fuse.kvmsim noauto,seed=3,nofail 0 0\n")
    script = """
mkdir sbin; ln -s "$(command -v kvmsim)" sbin/mount.fuse.kvmsim; mount --bind sbin /sbin
mount -T fstab "$HOME/host"; kvmsim info --json; umount "$HOME/host"
"""
    info = json.loads(succeeded(shell.run("unshare", "-m", "sh", "-ec", script)))
    assert (info["preset"], info["seed"]) == ("lab-amd", 3)
    deadline = time.monotonic() + 10
    while shell.leftovers():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_command_about_a_running_host_loads_neither_trio_nor_fuse(shell, host):
    code = (
        "import sys; from kvmsim.cli import kvmsim; kvmsim(['vm', 'list'], standalone_mode=False);"
        "print(sorted({'trio', 'pyfuse3', 'rich', 'psutil'} & set(sys.modules)))"
    )
    environment = shell.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("command", ["kvmsim down $0", "kvmsim info --host $0"])
def test_host_of_another_user_is_refused(shell, ordinary, fuse, command):
    directory = ordinary.home.parent / "theirs"
    succeeded(shell.kvmsim("up", directory, "--preset", "lab-amd"))
    done = ordinary.run("sh", "-c", command, directory)
    succeeded(shell.kvmsim("down", directory))
    line = f"kvmsim: {directory}: belongs to the user with uid 0\n"
    assert (done.returncode, done.stderr) == (os.EX_NOPERM, line)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_root_can_use_and_end_the_host_of_a_user(ordinary, fuse):
    environment = dict(ordinary.environment)
    del environment["KVMSIM_RUNTIME_DIR"]
    # Both in one mount namespace: the user starts it, root looks at it and ends it.
    then = 'kvmsim info --json --host "$HOME/host"; kvmsim down "$HOME/host"'
    user = OrdinaryShell(ordinary.home, environment, then=then)
    info = json.loads(succeeded(user.run("kvmsim", "up", "host", "--preset", "lab-amd")))
    runtime = Path(info["socket"]).parent
    assert (info["uid"], runtime) == (65534, Path("/tmp/kvmsim-65534"))
    assert list(runtime.iterdir()) == []
    runtime.rmdir()


def test_records_are_taken_from_guests_and_given_back(shell, host):
    for word in ("take", "take", "release"):
        done = shell.kvmsim("lbr", word)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_option_of_the_kernel_reaches_the_host(shell, fuse):
    started = shell.kvmsim("up", "host", "--preset", "lab-intel", "--split-lock-detect", "fatal")
    assert (started.returncode, started.stderr) == (0, "")
    assert shell.kvmsim("info").returncode == 0
    shell.kvmsim("down", shell.home / "host")
