import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kvmsim.interpose import Unavailable, libc

SUPERVISE = Path(__file__).parent / "supervise.py"

pytestmark = pytest.mark.usefixtures("trapping")


@pytest.mark.parametrize("mode", ["runs", "asks"])
def test_calls_fail_at_once_when_the_supervisor_is_killed(compiled, mode):
    command = [sys.executable, SUPERVISE, compiled("orphan"), mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        ready = supervisor.stdout.readline().split()
        assert ready[0] == "ready"
        supervisor.kill()
        # The pipe's end comes when the client has ended too.
        assert supervisor.stdout.read() == f"errno {errno.ENOSYS}\n"
        assert supervisor.wait() == -signal.SIGKILL


def test_second_listener_is_refused_with_its_reason(halted, capfd):
    assert halted.run(sys.executable, SUPERVISE, "true") == 1
    assert capfd.readouterr().err == (
        "unavailable: this process is already under a seccomp listener "
        "(another kvmsim run, or a container's); Linux allows one\n"
    )


def test_termination_of_the_supervisor_reaches_the_client(compiled):
    command = [sys.executable, SUPERVISE, compiled("orphan"), "runs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        client = int(supervisor.stdout.readline().split()[1])
        supervisor.terminate()
        assert supervisor.wait() == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(client, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_after_the_program_ended_leaves_its_children_alone(number):
    program = 'sleep 60 & echo "$!"'
    command = [sys.executable, SUPERVISE, "sh", "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as supervisor:
        left_behind = int(supervisor.stdout.readline())
        time.sleep(0.3)
        supervisor.send_signal(number)
        try:
            assert supervisor.wait(10) == 0
        finally:
            os.kill(left_behind, signal.SIGKILL)
            supervisor.kill()


def test_signals_to_the_supervisor_do_not_reach_calls_that_make_descriptors(
    halted, compiled, capfd
):
    halted.limit_asids(1)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        status = halted.run(compiled("churn"), 400)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (capfd.readouterr().out, status) == ("", 0)


def test_stopped_client_leaves_kvm_run_and_stops(compiled):
    command = [sys.executable, SUPERVISE, compiled("orphan"), "runs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        client = int(supervisor.stdout.readline().split()[1])
        time.sleep(0.05)
        os.kill(client, signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while state_of(client) != "T":
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(client, signal.SIGCONT)
        assert supervisor.stdout.read() == f"errno {errno.EINTR}\n"


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_user_without_inotify_left_is_told(halted, monkeypatch):
    def no_more():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(libc, "inotify_init", no_more)
    with pytest.raises(Unavailable, match=r"^cannot watch the client's descriptors: Too many"):
        halted.run("sleep", "100")


def test_traced_client_is_refused_with_its_reason(tmp_path):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace here")
    command = [strace, "-f", "-o", tmp_path / "trace", sys.executable, SUPERVISE, "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("unavailable: the client is traced by process ")


def test_client_without_privileges_gets_the_same_answers(compiled):
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("takes root and setpriv; the other tests are this one for an ordinary user")
    # The interpreter may be where only root can read.
    reader = "+dac_read_search"
    nobody = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    nobody += [f"--inh-caps=-all,{reader}", f"--ambient-caps=-all,{reader}"]
    if subprocess.run([*nobody, "unshare", "-Um", "true"], check=False).returncode:
        pytest.skip("no user namespaces without privileges here")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        for name in ("spaces", "pointers", "signals"):
            program = shutil.copy(compiled(name), directory)
            command = [*nobody, sys.executable, SUPERVISE, program]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
