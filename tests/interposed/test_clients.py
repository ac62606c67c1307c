import os
import signal
import tempfile

import pytest

from kvmsim.interpose import CommandNotRun

HERE = os.getpid()


@pytest.mark.parametrize("flags", [(), ("-static",)], ids=["dynamic", "static"])
def test_client_gets_from_open_to_a_scripted_exit(host, compiled, capfd, flags):
    assert host.run(compiled("calls", *flags)) == 7
    assert capfd.readouterr().out == "done\n"


@pytest.mark.parametrize("name", ["pointers", "spaces", "stats"])
def test_client_finds_what_linux_would_give(halted, compiled, capfd, name):
    status = halted.run(compiled(name))
    assert (capfd.readouterr().out, status) == ("", 0)


@pytest.mark.parametrize("name", ["lifetimes", "closing"])
def test_only_asid_is_taken_as_long_as_something_refers_to_the_vm(halted, compiled, capfd, name):
    halted.limit_asids(1)
    status = halted.run(compiled(name))
    assert (capfd.readouterr().out, status) == ("", 0)


def test_ten_thousand_vms_one_after_the_other_fit_a_pool_of_one(halted, compiled, capfd):
    halted.limit_asids(1)
    status = halted.run(compiled("churn"), 10_000)
    assert (capfd.readouterr().out, status) == ("", 0)


def test_signals_end_kvm_run_with_eintr(halted, compiled, capfd):
    status = halted.run(compiled("signals"))
    assert (capfd.readouterr().out, status) == ("", 0)


def test_status_of_the_program_is_returned(halted):
    assert halted.run("sh", "-c", "exit 5") == 5
    assert halted.run("sh", "-c", "kill -KILL $$") == 128 + 9


def test_children_that_outlive_the_program_are_served(halted, compiled, capfd):
    script = f"( sleep 0.2; exec {compiled('churn')} 10 && echo served ) & exit 4"
    assert halted.run("sh", "-c", script) == 4


def test_threads_go_on_after_the_first_one_has_ended(halted, compiled, capfd):
    status = halted.run(compiled("leader"))
    assert (capfd.readouterr().out, status) == ("went on\n", 6)


def test_program_that_does_not_exist_is_reported(halted):
    with pytest.raises(CommandNotRun, match=r"^/no/such/program: No such file or directory$"):
        halted.run("/no/such/program")


def test_module_parameters_are_the_emulated_kernels(halted, capfd):
    assert halted.run("cat", "/sys/module/kvm_amd/parameters/sev") == 0
    assert capfd.readouterr().out == "Y\n"


def test_devices_of_the_machine_stay(halted, capfd):
    script = "test -c /dev/null && test -c /dev/kvm && echo x > /dev/null && ls /dev/fd /dev/pts"
    assert halted.run("sh", "-c", script) == 0
    assert "0" in capfd.readouterr().out.split()


def test_client_ignores_no_signal_that_only_python_does(halted, capfd):
    assert halted.run("grep", "SigIgn:", "/proc/self/status") == 0
    ignored = int(capfd.readouterr().out.split()[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        assert not ignored >> number - 1 & 1


def test_nothing_of_the_client_is_seen_outside(halted):
    before = os.stat("/dev").st_ino
    halted.run("true")
    assert os.stat("/dev").st_ino == before
    assert os.getpid() == HERE


def test_tree_in_place_of_the_cgroups_passes_for_cgroup2(halted, compiled, capfd):
    # Any file system of its own will do; the emulated one's files are served elsewhere.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as tree:
        os.mkdir(f"{tree}/child")
        status = halted.run(compiled("cgroup"), cgroup_dir=tree)
    assert (capfd.readouterr().out, status) == ("", 0)
