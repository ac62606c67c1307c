"""`kvmsim run`: real programs on a mounted host."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sessions.kvm_client import KvmClient

ONE_ASID = """vendor = "amd"
[sev]
max-asid = 2
min-sev-asid = 2
"""


@pytest.fixture
def trapping(shell, host):
    """Skips where calls cannot be trapped."""
    done = shell.kvmsim("run", "--", "true")
    if done.returncode == os.EX_UNAVAILABLE:
        pytest.skip(done.stderr)
    assert (done.returncode, done.stderr) == (0, "")
    return host


@pytest.fixture
def clients(shell, trapping):
    """Starts clients; those that still run are killed in the end."""
    del trapping
    started = []

    def start(*options):
        client = KvmClient(shell, *options)
        started.append(client)
        return client

    yield start
    for client in started:
        client.process.kill()
        client.wait()


@pytest.fixture
def cgroup(trapping):
    """The root cgroup, with every controller for its children."""
    root = trapping / "sys/fs/cgroup"
    (root / "cgroup.subtree_control").write_text("+encryption_ids +misc +bus_lock")
    for name in ("a", "b"):
        (root / name).mkdir()
    return root


def sev(cgroup):
    """SEV ASIDs that a cgroup is charged."""
    lines = (cgroup / "misc.current").read_text().splitlines()
    return int(dict(line.split() for line in lines)["sev"])


def counts(path):
    return {key: int(value) for key, value in (s.split() for s in path.read_text().splitlines())}


def until(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_exit_status_is_the_programs(shell, trapping):
    for script, status in (("exit 3", 3), ("kill -TERM $$", 143)):
        done = shell.kvmsim("run", "--", "sh", "-c", script)
        assert (done.returncode, done.stderr) == (status, "")


def test_options_of_the_program_are_its_own(shell, trapping):
    done = shell.kvmsim("run", "echo", "--trace", "-h")
    assert (done.returncode, done.stdout) == (0, "--trace -h\n")


# What cannot be run: arguments, exit code, how the line begins.
REFUSALS = (
    (("--", "./nothing"), 127, "./nothing: No such file or directory"),
    (("--", "/etc/passwd"), 126, "/etc/passwd: Permission denied"),
    (("--cgroup", "/nowhere", "--", "true"), 69, "no cgroup /nowhere below"),
    (("--guest", "script:none", "--", "true"), 69, "cannot read none: No such file"),
    (("--guest", "idle", "--", "true"), 64, '--guest idle: not x86, halt or "script:" and a file'),
    (("--trace", "no/dir", "--", "true"), 69, "cannot write no/dir: No such file"),
    (("--passthrough", "--cgroup", "/", "--", "true"), 64, "--passthrough has no host"),
    (("--answer-cap", "1=2", "--", "true"), 64, "--answer-cap goes with --passthrough"),
    (("--passthrough", "--answer-cap", "x", "--", "true"), 64, "--answer-cap x: not a number"),
    (("--host", "/tmp", "--", "true"), 69, "/tmp: no host runs here"),
)


def test_what_cannot_be_run_is_one_line(shell, trapping):
    for arguments, status, line in REFUSALS:
        done = shell.kvmsim("run", *arguments)
        assert (done.returncode, done.stdout) == (status, ""), arguments
        assert done.stderr.startswith(f"kvmsim: {line}")
        assert done.stderr.count("\n") == 1


def test_without_a_host_there_is_no_client(shell):
    done = shell.kvmsim("run", "--", "true")
    assert done.returncode == os.EX_UNAVAILABLE
    assert done.stderr == "kvmsim: no host runs; start one with: kvmsim up DIR\n"


def test_client_of_a_client_is_refused(shell, trapping):
    done = shell.kvmsim("run", "--", "kvmsim", "run", "--", "true")
    assert done.returncode == os.EX_UNAVAILABLE
    assert done.stderr.startswith("kvmsim: this process is already under a seccomp listener")
    assert done.stderr.count("\n") == 1


def test_ordinary_user_runs_clients_on_a_host_of_their_own(ordinary, fuse):
    script = (
        "kvmsim up host --preset lab-amd || exit; kvmsim run --cgroup / -- id -u; echo $?;"
        " kvmsim down host"
    )
    done = ordinary.run("sh", "-c", script)
    if "kvmsim: cannot give the client" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.stdout, done.stderr) == ("65534\n0\n", "")


def test_client_starts_in_its_cgroup_and_is_charged_there(clients, cgroup):
    client = clients("--cgroup", "/a")
    assert client("vm", "init") == 0
    assert (sev(cgroup / "a"), sev(cgroup / "b")) == (1, 0)
    assert str(client("pid")) in (cgroup / "a/cgroup.procs").read_text().split()
    client("vm", "init")
    assert sev(cgroup / "a") == 2
    for _ in range(50):
        assert client("close") == 0
        assert sev(cgroup / "a") == 0  # no later than the close has returned
        assert client("vm", "init") == 0
    assert client.end() == 0


def test_counters_are_back_when_the_command_returns(shell, cgroup):
    code = (
        "import fcntl,os; kvm=os.open('/dev/kvm',2); vm=fcntl.ioctl(kvm,0xae01,0);"
        "fcntl.ioctl(vm,0xc008aeba,bytearray(24)); os.kill(os.getpid(), 9)"
    )
    for _ in range(5):
        done = shell.kvmsim("run", "--cgroup", "/a", "--", sys.executable, "-c", code)
        assert (done.returncode, done.stderr) == (137, "")
        assert sev(cgroup / "a") == 0


def test_client_that_moves_itself_is_charged_where_it_is(clients, cgroup):
    client = clients("--cgroup", "/a")
    assert client(f"move {cgroup}/b/cgroup.procs", "vm", "init") == 0
    assert (sev(cgroup / "a"), sev(cgroup / "b")) == (0, 1)


def test_child_of_a_client_is_charged_where_it_was_born(clients, cgroup):
    client = clients("--cgroup", "/b")
    assert client("fork-init") == "0"
    assert sev(cgroup / "b") == 1
    (cgroup / "b/cgroup.kill").write_text("1")
    until(lambda: sev(cgroup / "b") == 0)
    assert client.wait() == 137


def test_vms_of_clients_are_listed_and_have_debugfs_directories(shell, clients, cgroup, host):
    client = clients("--cgroup", "/a")
    fd = client("vm")
    client("init")
    name = f"{client('pid')}-{fd}"
    debugfs = host / "sys/kernel/debug/kvm"
    until((debugfs / name).is_dir)
    [vm] = json.loads(shell.kvmsim("vm", "list", "--json").stdout)
    assert (vm["name"], vm["type"], vm["cgroup"], vm["asid"]) == (name, "sev", "/a", 6)
    assert vm["guest"].startswith("client python")
    stopped = shell.kvmsim("vm", "stop", name)
    assert stopped.stderr == (
        f"kvmsim: vm {name}: it belongs to a program: end process {client('pid')}\n"
    )
    info = json.loads(shell.kvmsim("info", "--json").stdout)
    assert (info["vms"], info["resources"]["sev"]["used"]) == (1, 1)
    client("close")
    until(lambda: not (debugfs / name).exists())
    assert shell.kvmsim("vm", "list", "--json").stdout == "[]\n"


def test_scripted_guest_and_faults(shell, clients, host):
    script = shell.home / "guest.script"
    script.write_text(
        "bus-lock\nio port=0x3f8 data=68\neintr\nhlt\n[vcpu 1]\nshutdown\n"
        "fail KVM_CREATE_VM 2 ENOMEM\nno-asids 2+\n"
    )
    client = clients("--guest", f"script:{script}")
    client("vm")
    assert client("init") == 0
    assert client("vm") == "ENOMEM"
    client("vm")
    assert client("init") == "EBUSY"
    client("buslock", "vcpu")
    assert [client("run") for _ in range(4)] == [[0, 33], [0, 2], ["EINTR", 10], [0, 5]]
    client("vcpu")
    assert client("run") == [0, 8]
    debugfs = host / "sys/kernel/debug/kvm"
    until(lambda: (debugfs / "exits").read_text() == "5\n")
    assert (debugfs / "io_exits").read_text() == "1\n"


def test_bad_script_is_one_line_with_its_place(shell, trapping):
    (shell.home / "s").write_text("hlt\nfail KVM_RUN x EIO\n")
    done = shell.kvmsim("run", "--guest", "script:s", "--", "true")
    assert done.returncode == os.EX_CONFIG
    assert done.stderr.startswith('kvmsim: s:2: "x" does not say which call')


def test_trace_has_every_call(shell, clients):
    client = clients("--trace", "t.json")
    client("version", "vm", "buslock", "vcpu")
    client.end()
    lines = [json.loads(line) for line in (shell.home / "t.json").read_text().splitlines()]
    shown = [(line["file"], line["call"]) for line in lines]
    assert shown == [
        ("system", "KVM_GET_API_VERSION"),
        ("system", "KVM_CREATE_VM"),
        ("vm", "KVM_ENABLE_CAP"),
        ("vm", "KVM_CREATE_VCPU"),
    ]
    assert lines[0]["result"] == 12
    assert lines[2]["arg"]["name"] == "KVM_CAP_X86_BUS_LOCK_EXIT"


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm")
def test_passthrough_traces_the_machines_own_kvm_and_answers_a_capability(shell, trapping):
    code = (
        "import fcntl,os; kvm=os.open('/dev/kvm',2); vm=fcntl.ioctl(kvm,0xae01,0);"
        "print(fcntl.ioctl(kvm,0xae03,193), fcntl.ioctl(vm,0xae03,193), fcntl.ioctl(kvm,0xae00))"
    )
    options = ("--passthrough", "--trace", "t.json", "--answer-cap", "193=1234")
    done = shell.kvmsim("run", *options, "--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1234 1234 12\n", "")
    lines = [json.loads(line) for line in (shell.home / "t.json").read_text().splitlines()]
    assert [(line["file"], line["call"], line["result"]) for line in lines] == [
        ("system", "KVM_CREATE_VM", None),
        ("system", "KVM_CHECK_EXTENSION", 1234),
        ("vm", "KVM_CHECK_EXTENSION", 1234),
        ("system", "KVM_GET_API_VERSION", None),
    ]


# -- limits, freezing, killing ---------------------------------------------------------------------


@pytest.fixture
def locking(shell):
    """A script whose guests do nothing but lock the bus."""
    path = shell.home / "locks.script"
    path.write_text("bus-lock after=1us\nloop\n")
    return f"script:{path}"


def test_limit_of_the_cgroup_holds_a_clients_guest(clients, cgroup, locking):
    (cgroup / "a/bus_lock.max").write_text("20 100000")
    client = clients("--cgroup", "/a", "--guest", locking)
    client("vm", "buslock", "vcpu")
    began = time.monotonic()
    assert client("run 61") == [0, 33]  # re-entry waits: 60 are admitted
    took = time.monotonic() - began
    assert counts(cgroup / "a/bus_lock.stat")["nr_events"] == 60
    assert took >= 0.19


def test_signal_interrupts_a_throttled_guest(clients, cgroup, locking):
    (cgroup / "a/bus_lock.max").write_text("1 1000000")
    client = clients("--cgroup", "/a", "--guest", locking)
    client("vm", "buslock", "vcpu", "run 2", "alarm 0.05")
    assert client("run") == ["EINTR", 10]
    assert counts(cgroup / "a/bus_lock.stat")["nr_throttled"] == 1
    client("close")  # what it owed is dropped
    until(lambda: counts(cgroup / "a/bus_lock.stat")["nr_cancelled"] == 1)


def test_frozen_client_stands_still_even_when_throttled(clients, cgroup, locking):
    (cgroup / "a/bus_lock.max").write_text("1 1000000")
    client = clients("--cgroup", "/a", "--guest", locking)
    client("vm", "buslock", "vcpu", "run 2")
    client.tell("run")
    until(lambda: counts(cgroup / "a/bus_lock.stat")["nr_throttled"] == 1)
    (cgroup / "a/cgroup.freeze").write_text("1")
    until(lambda: "frozen 1" in (cgroup / "a/cgroup.events").read_text())
    (cgroup / "a/cgroup.freeze").write_text("0")
    assert client.answer() == ["EINTR", 10]


def test_raised_limit_lets_a_waiting_client_go(clients, cgroup, locking):
    (cgroup / "a/bus_lock.max").write_text("1 1000000")
    client = clients("--cgroup", "/a", "--guest", locking)
    client("vm", "buslock", "vcpu", "run 2")
    client.tell("run")
    until(lambda: counts(cgroup / "a/bus_lock.stat")["nr_throttled"] == 1)
    (cgroup / "a/bus_lock.max").write_text("max")
    assert client.answer() == [0, 33]


def test_killed_cgroup_ends_its_clients_and_their_charges(clients, cgroup):
    one, two = clients("--cgroup", "/a"), clients("--cgroup", "/b")
    one("vm", "init")
    two("vm", "init")
    (cgroup / "a/cgroup.kill").write_text("1")
    assert one.wait() == 137
    assert (sev(cgroup / "a"), sev(cgroup / "b")) == (0, 1)


# -- the last ASID ---------------------------------------------------------------------------------


@pytest.fixture
def narrow(shell, fuse):
    """A host with a single SEV ASID."""
    (shell.home / "one.toml").write_text(ONE_ASID)
    done = shell.kvmsim("up", "host", "--preset", "./one.toml", "--controllers", "misc")
    assert (done.returncode, done.stderr) == (0, "")
    yield shell.home / "host/sys/fs/cgroup"
    shell.kvmsim("down", "host")


def test_last_asid_goes_to_one_of_two_clients(shell, narrow):
    for path in (narrow, narrow / "p"):
        path.mkdir(exist_ok=True)
        (path / "cgroup.subtree_control").write_text("+misc")
    for name in ("a", "b"):
        (narrow / "p" / name).mkdir()
    (narrow / "p/misc.max").write_text("sev 1")
    clients = [KvmClient(shell, "--cgroup", f"/p/{name}") for name in ("a", "b")]
    wins = [0, 0]
    for turn in range(100):
        for client in clients:
            client("vm")
        order = clients if turn % 2 else clients[::-1]
        for client in order:
            client.tell("init")
        results = [client.answer() for client in clients]
        assert sorted(map(str, results)) == ["0", "EBUSY"]
        winner = results.index(0)
        wins[winner] += 1
        charged = [sev(narrow / "p" / name) for name in ("a", "b")]
        assert charged == [winner == 0, winner == 1]
        for client in clients:
            client("close")
        assert sev(narrow / "p") == 0
    assert [client.end() for client in clients] == [0, 0]
    assert min(wins) > 0
    # The limit of p refused, not one of a or b.
    assert counts(narrow / "p/misc.events.local")["sev.max"] == 100
    assert counts(narrow / "p/misc.events")["sev.max"] == 100
    for name in ("a", "b"):
        assert counts(narrow / "p" / name / "misc.events")["sev.max"] == 0
    assert sev(narrow / "p") == 0


def test_asid_that_was_given_back_is_there_for_another_client_at_once(shell, narrow):
    clients = [KvmClient(shell, "--cgroup", "/") for _ in range(2)]
    for turn in range(100):
        client = clients[turn % 2]
        assert client("vm", "init") == 0
        assert client("close") == 0
    assert [client.end() for client in clients] == [0, 0]


# -- what dies -------------------------------------------------------------------------------------


def test_killed_supervisor_fails_its_client_at_once_and_the_host_takes_all_back(clients, cgroup):
    client = clients("--cgroup", "/a")
    client("vm", "init")
    pid = client("pid")
    client.process.kill()
    until(lambda: sev(cgroup / "a") == 0)
    began = time.monotonic()
    assert client("version") == errno.errorcode[errno.ENOSYS]
    assert time.monotonic() - began < 1
    os.kill(pid, signal.SIGKILL)
    assert client.wait() == -9


def test_client_of_a_killed_host_gets_eio_and_does_not_hang(shell, clients, cgroup, locking):
    (cgroup / "a/bus_lock.max").write_text("1 1000000")
    client = clients("--cgroup", "/a", "--guest", locking)
    client("vm", "init", "close", "vm", "buslock", "vcpu", "run 2")
    client.tell("run")
    until(lambda: counts(cgroup / "a/bus_lock.stat")["nr_throttled"] == 1)
    os.kill(shell.server(), signal.SIGKILL)
    assert client.answer()[0] in (0, "EINTR")
    assert client("vm") == "EIO"
    assert client("run")[0] == "EIO"
    assert client("close") == 0
    assert client.end() == 0
    assert shell.kvmsim("down", "host").returncode == 0


CHURN = """
import fcntl, os
kvm = os.open("/dev/kvm", 2)
while True:
    vm = fcntl.ioctl(kvm, 0xAE01, 0)
    fcntl.ioctl(vm, 0xC008AEBA, bytearray(24))
    os.close(vm)
"""


@pytest.fixture
def churning(shell, cgroup):
    """Starts a client in /a that makes encrypted VMs without pause; its supervisor and its pid."""
    started = []

    def start():
        command = ["kvmsim", "run", "--cgroup", "/a", "--", sys.executable, "-c", CHURN]
        supervisor = subprocess.Popen(
            command, cwd=shell.home, env=shell.environment, stderr=subprocess.DEVNULL
        )
        started.append(supervisor)
        procs = cgroup / "a/cgroup.procs"
        until(procs.read_text)
        return supervisor, int(procs.read_text().split()[0])

    yield start
    for supervisor in started:
        supervisor.kill()
        supervisor.wait()


@pytest.mark.parametrize("victim", ["client", "supervisor"])
def test_what_is_killed_at_a_random_point_leaves_no_charge(shell, cgroup, churning, victim):
    chance = random.Random(4)
    for _ in range(5):
        supervisor, client = churning()
        time.sleep(0.05 + chance.random() / 10)
        os.kill(client if victim == "client" else supervisor.pid, signal.SIGKILL)
        assert supervisor.wait(timeout=20) == (137 if victim == "client" else -9)
        until(lambda: sev(cgroup / "a") == 0)
        until(lambda: not (cgroup / "a/cgroup.procs").read_text())
    info = json.loads(shell.kvmsim("info", "--json").stdout)
    assert info["resources"]["sev"]["used"] == info["vms"] == 0


def test_supervisor_leaves_no_process_and_no_descriptor_behind(shell, clients):
    client = clients()
    client("vm", "init")
    server = Path(f"/proc/{shell.server()}/fd")
    client.end()
    before = len(list(server.iterdir()))
    for _ in range(3):
        again = clients()
        again("vm", "init")
        again.end()
    assert len(list(server.iterdir())) == before
