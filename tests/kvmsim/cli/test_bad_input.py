"""What users get wrong: one line, the right exit code, nothing left behind."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cgfs.control.mountpoints import mount_at


def refused(done, exit_code, *words):
    """One line on standard error that contains the words, and the exit code."""
    assert (done.returncode, done.stdout) == (exit_code, ""), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("kvmsim: ")
    for word in words:
        assert word in done.stderr


def test_unknown_preset_names_the_known_ones(shell, fuse):
    refused(shell.kvmsim("up", "host", "--preset", "milan"), os.EX_CONFIG, "milan", "lab-amd")
    assert not (shell.home / "host").exists()


def test_broken_toml_names_file_and_line(shell, fuse):
    (shell.home / "mine.toml").write_text('vendor = "amd"\ncpus = \n')
    done = shell.kvmsim("up", "host", "--preset", "mine.toml")
    refused(done, os.EX_CONFIG, "mine.toml", "line 2")


def test_unknown_key_is_named(shell, fuse):
    (shell.home / "mine.toml").write_text('vendor = "amd"\nasids = 3\n')
    done = shell.kvmsim("up", "host", "--preset", "mine.toml")
    refused(done, os.EX_CONFIG, "mine.toml", "asids")


def test_directory_with_content_is_left_alone(shell, fuse):
    (shell.home / "host").mkdir()
    (shell.home / "host/file").touch()
    refused(shell.kvmsim("up", "host"), os.EX_UNAVAILABLE, "not empty")
    assert (shell.home / "host/file").exists()


def test_directory_that_is_not_utf8_is_refused(shell, fuse):
    odd = shell.home / os.fsdecode(b"bad\xff")
    refused(shell.kvmsim("up", odd), os.EX_USAGE, r"bad\xff: the path is not UTF-8 text")
    assert shell.leftovers() == []
    assert not odd.exists()


def test_name_of_a_vm_that_is_not_utf8_is_refused(shell, host):
    done = shell.kvmsim("vm", "show", os.fsdecode(b"bad\xff"))
    refused(done, os.EX_USAGE, r"bad\xff: not UTF-8 text")


def test_directory_below_nothing_is_not_created(shell, fuse):
    refused(shell.kvmsim("up", "none/host"), os.EX_UNAVAILABLE, "none/host")


def test_file_is_no_directory(shell, fuse):
    (shell.home / "host").touch()
    refused(shell.kvmsim("up", "host"), os.EX_OSERR, "host")


def test_second_host_on_one_directory_is_refused_and_the_first_goes_on(shell, host):
    done = shell.kvmsim("up", host, "--preset", "lab-amd")
    refused(done, os.EX_UNAVAILABLE, str(host), "already mounted", "kvmsim down")
    assert shell.kvmsim("info").returncode == 0


def test_mount_point_of_somebody_else_is_refused(shell, fuse):
    refused(shell.kvmsim("up", "/proc"), os.EX_UNAVAILABLE, "/proc", "mounted here already")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to hide /dev/fuse")
def test_missing_device_is_told(shell):
    hide = 'mount -t tmpfs none /dev && exec kvmsim up "$0"'
    done = shell.run("unshare", "-m", "sh", "-c", hide, "host")
    refused(done, os.EX_UNAVAILABLE, "/dev/fuse")
    assert not (shell.home / "host").exists()


def test_dead_daemon_behind_a_mount_is_told_and_cleared(shell, host):
    kill_with_its_helper(shell)
    refused(shell.kvmsim("up", host), os.EX_UNAVAILABLE, "died", f"kvmsim down {host}")
    refused(shell.kvmsim("vm", "list"), os.EX_UNAVAILABLE, "died", f"kvmsim down {host}")
    cleared = shell.kvmsim("down", host)
    assert (cleared.returncode, cleared.stderr) == (0, "")
    assert shell.leftovers() == []
    assert not host.exists()


def kill_with_its_helper(shell):
    """SIGKILL for all of a host: fusermount3 would unmount for a server that dies alone."""
    server = shell.server()
    descriptor = os.pidfd_open(server)
    for pid in shell.processes():
        if pid != server:
            os.kill(pid, signal.SIGKILL)
    os.kill(server, signal.SIGKILL)
    assert ended(descriptor)


def test_host_whose_server_was_killed_can_be_started_again(shell, host):
    descriptor = os.pidfd_open(shell.server())
    os.kill(shell.server(), signal.SIGKILL)
    assert ended(descriptor)
    shell.kvmsim("down", host)
    again = shell.kvmsim("up", host, "--preset", "lab-amd")
    assert (again.returncode, again.stderr) == (0, "")


def test_down_clears_after_kill_9_while_a_vm_runs_and_a_shell_is_inside(shell, host):
    shell.kvmsim("vm", "start", "a", "--type", "sev", "--guest", "buslock rate=100")
    inside = subprocess.Popen(["sleep", "60"], cwd=host / "sys/fs/cgroup")
    server = shell.server()
    os.kill(server, signal.SIGKILL)
    cleared = shell.kvmsim("down", host)
    inside.kill()
    inside.wait()
    assert cleared.returncode == 0
    assert shell.leftovers() == []


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def frozen(host):
    """A real process in a frozen cgroup."""
    cgroup = host / "sys/fs/cgroup/cold"
    cgroup.mkdir()
    sleeper = subprocess.Popen(["sleep", "60"])
    (cgroup / "cgroup.procs").write_text(str(sleeper.pid))
    (cgroup / "cgroup.freeze").write_text("1")
    assert (cgroup / "cgroup.events").read_text() == "populated 1\nfrozen 1\n"
    assert state_of(sleeper.pid) == "T"
    yield sleeper
    sleeper.kill()
    sleeper.wait()


def test_frozen_process_goes_on_when_the_host_is_taken_down(shell, host, frozen):
    assert shell.kvmsim("down", host).returncode == 0
    assert state_of(frozen.pid) == "S"


@pytest.mark.parametrize("command", ["down", "up"])
def test_frozen_process_of_a_killed_host_goes_on(shell, host, frozen, command):
    descriptor = os.pidfd_open(shell.server())
    os.kill(shell.server(), signal.SIGKILL)
    assert ended(descriptor)
    while mount_at(host) is not None:  # fusermount3 sees to that
        time.sleep(0.01)
    assert state_of(frozen.pid) == "T"
    assert shell.kvmsim(command, host).returncode == 0
    assert state_of(frozen.pid) == "S"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_unmounts_cleanly(shell, host, number):
    server = shell.server()
    descriptor = os.pidfd_open(server)
    os.kill(server, number)
    assert ended(descriptor)
    assert shell.leftovers() == []


def ended(pidfd, seconds=10):
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)


def test_umount_by_somebody_else_ends_the_host(shell, host):
    server = shell.server()
    descriptor = os.pidfd_open(server)
    subprocess.run(["fusermount3", "-u", host], check=True)
    assert ended(descriptor)
    assert shell.leftovers() == []


def test_down_of_what_is_no_host_is_refused(shell):
    refused(shell.kvmsim("down", shell.home), os.EX_UNAVAILABLE, "no kvmsim is mounted here")
    refused(shell.kvmsim("down", "/proc"), os.EX_UNAVAILABLE, "no kvmsim is mounted here")
    refused(shell.kvmsim("down", "none"), os.EX_UNAVAILABLE, "none")


def test_no_host_at_all_is_told_with_what_to_do(shell):
    refused(shell.kvmsim("vm", "list"), os.EX_UNAVAILABLE, "kvmsim up DIR")


def test_two_hosts_need_a_choice(shell, host):
    other = shell.home / "other"
    shell.kvmsim("up", other, "--preset", "tdx31")
    refused(shell.kvmsim("info"), os.EX_USAGE, "--host", str(host), str(other))
    chosen = shell.kvmsim("info", "--host", other, "--json")
    shell.environment["KVMSIM_HOST"] = str(host)
    by_environment = shell.kvmsim("info", "--json")
    shell.kvmsim("down", other)
    assert json.loads(chosen.stdout)["preset"] == "tdx31"
    assert json.loads(by_environment.stdout)["preset"] == "lab-amd"


def test_vm_name_that_is_taken_is_refused_and_nothing_is_charged(shell, host):
    shell.kvmsim("vm", "start", "a", "--type", "sev")
    refused(shell.kvmsim("vm", "start", "a", "--type", "sev"), os.EX_UNAVAILABLE, "vm a: ")
    assert (host / "sys/fs/cgroup/misc.current").read_text() == "sev 1\nsev_es 0\n"


def test_unknown_guest_word_is_a_usage_error(shell, host):
    done = shell.kvmsim("vm", "start", "a", "--type", "sev", "--guest", "nonsense rate=1")
    refused(done, os.EX_USAGE, "vm a: ", "nonsense")
    nothing_started(shell, host)


def test_cgroup_that_does_not_exist_is_told(shell, host):
    done = shell.kvmsim("vm", "start", "a", "--type", "sev", "--cgroup", "/nowhere")
    refused(done, os.EX_UNAVAILABLE, "vm a: ", "/nowhere")
    nothing_started(shell, host)


def test_cgroup_that_controls_its_children_is_told(shell, host):
    cgroup = host / "sys/fs/cgroup"
    (cgroup / "cgroup.subtree_control").write_text("+misc +encryption_ids")
    (cgroup / "parent").mkdir()
    (cgroup / "parent/cgroup.subtree_control").write_text("+misc +encryption_ids")
    done = shell.kvmsim("vm", "start", "a", "--type", "sev", "--cgroup", "/parent")
    words = 'cgroup /parent takes no processes: cgroup.subtree_control "encryption_ids misc"'
    refused(done, os.EX_UNAVAILABLE, f"vm a: {words} (EBUSY)")
    nothing_started(shell, host)


def test_cgroup_that_is_no_valid_domain_is_told(shell, host):
    cgroup = host / "sys/fs/cgroup"
    (cgroup / "parent/threads").mkdir(parents=True)
    (cgroup / "parent/other").mkdir()
    (cgroup / "parent/threads/cgroup.type").write_text("threaded")
    done = shell.kvmsim("vm", "start", "a", "--cgroup", "/parent/other")
    words = 'cgroup /parent/other takes no processes: cgroup.type "domain invalid"'
    refused(done, os.EX_UNAVAILABLE, f"vm a: {words} (EOPNOTSUPP)")
    nothing_started(shell, host)


def test_type_this_machine_has_not_is_told(shell, host):
    done = shell.kvmsim("vm", "start", "a", "--type", "tdx")
    refused(done, os.EX_UNAVAILABLE, "vm a: ", "tdx")
    nothing_started(shell, host)


def nothing_started(shell, host):
    assert json.loads(shell.kvmsim("vm", "list", "--json").stdout) == []
    cgroup = host / "sys/fs/cgroup"
    assert (cgroup / "misc.current").read_text() == "sev 0\nsev_es 0\n"
    assert (cgroup / "encryption_ids.sev.stat").read_text() == "total 10\nused 0\n"
    assert all(int(pid) < 4194304 for pid in (cgroup / "cgroup.procs").read_text().split())


def test_machine_without_free_asids_says_so(shell, host):
    for number in range(5):
        shell.kvmsim("vm", "start", f"v{number}", "--type", "sev-es")
    done = shell.kvmsim("vm", "start", "more", "--type", "sev-es")
    refused(done, os.EX_TEMPFAIL, "no SEV-ES ASID", "the host is at", '5"', "EBUSY")


@pytest.mark.parametrize("command", [["vm", "stop", "x"], ["vm", "show", "x"]])
def test_vm_that_does_not_exist_is_told(shell, host, command):
    refused(shell.kvmsim(*command), os.EX_UNAVAILABLE, "vm x: no such VM")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["vn", "list"],
        ["up"],
        ["up", "host", "--seed", "x"],
        ["up", "host", "--controllers", "misc,cpu"],
        ["vm"],
        ["vm", "start"],
        ["vm", "start", "a", "--type", "sgx"],
        ["vm", "start", "a", "--vcpus", "0"],
        ["vm", "start", "a/b"],
        ["vm", "start", "a", "--bus-lock-ratelimit", "-1"],
        ["--nonsense"],
    ],
)
def test_usage_error_is_64_and_one_line(shell, fuse, arguments):
    done = shell.kvmsim(*arguments)
    assert done.returncode == os.EX_USAGE
    if arguments != ["vm"]:
        refused(done, os.EX_USAGE)


ASK = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(b'{"id": 1, "method": "host.info"}\\n')
print(connection.recv(4096).decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_somebody_else_is_refused_even_with_a_way_to_the_socket(host, shell, ordinary):
    [socket] = shell.runtime.glob("*.sock")
    socket.chmod(0o666)
    reach = os.open(socket, os.O_PATH)
    way = f"/proc/self/fd/{reach}"
    done = ordinary.run(sys.executable, "-c", ASK, way, pass_fds=[reach])
    os.close(reach)
    assert "uid 65534 may not use this socket" in done.stdout, done.stderr


def test_of_two_hosts_started_at_once_on_one_directory_one_wins(shell, fuse):
    command = ["kvmsim", "up", "host", "--preset", "lab-amd"]
    both = [
        subprocess.Popen(
            command, cwd=shell.home, env=shell.environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    lines = [one.communicate(timeout=60)[1] for one in both]
    down = shell.kvmsim("down", "host")
    assert sorted(one.returncode for one in both) == [0, os.EX_UNAVAILABLE]
    assert "already mounted" in "".join(lines)
    assert down.returncode == 0
