"""Figures of unmodified clients under `kvmsim run`: time per call, churn, many objects, memory."""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import worlds
from figures import Figure, resident_bytes

RATIO_TO_C = 3.0
MOST_CALL_US = 15.0
MOST_EXTRA_RUN_US = 2.0
MOST_START_S = 0.5
OBJECTS = 1_025

# One ASID for plain SEV, so that whoever loses one is refused the next.
ONE_ASID = """\
description = "one SEV ASID"
vendor = "amd"
model-name = "AMD EPYC of the benchmark"
family = 23
model = 1
stepping = 2
cpus = 8
tsc-khz = 2_200_000

[sev]
max-asid = 1
min-sev-asid = 1
"""
EXITS = "io port=0x3f8 size=1 data=2e\nloop\n"


class FailedCallError(worlds.MissingWorldError):
    """A command failed; the text is its last words."""


@dataclass(frozen=True)
class Host:
    """A started host.

    Attributes:
        client: The compiled kvm.c.
        prefix: What makes a command a client of the host.
        environment: What both have to run in.
        cgroups: The root of its cgroup tree.
    """

    client: Path
    prefix: Sequence[str]
    environment: dict[str, str]
    cgroups: Path

    def output(self, *arguments: str) -> float:
        """Runs kvm.c as a client and returns the number it prints."""
        return _number([*self.prefix, str(self.client), *arguments], self.environment)


@contextlib.contextmanager
def _host(scratch: Path) -> Iterator[Host]:
    """Yields a host with one ASID; its guests stop at every turn.

    Raises:
        FailedCallError: It does not start, or clients cannot be trapped here.
    """
    scratch.mkdir(exist_ok=True)
    client = worlds.compiled("kvm", scratch)
    preset, guest, target = (scratch / name for name in ("one.toml", "exits", "host"))
    preset.write_text(ONE_ASID)
    guest.write_text(EXITS)
    environment = {**os.environ, "KVMSIM_RUNTIME_DIR": str(scratch / "runtime")}
    kvmsim = str(Path(sys.executable).with_name("kvmsim"))
    _call([kvmsim, "up", str(target), "--preset", str(preset)], environment)
    try:
        prefix = [kvmsim, "run", "--host", str(target), "--guest", f"script:{guest}", "--"]
        _call([*prefix, "true"], environment)
        yield Host(client, prefix, environment, target / "sys/fs/cgroup")
    finally:
        _call([kvmsim, "down", str(target)], environment)


def call(scratch: Path, quick: bool) -> Sequence[Figure]:
    """Times KVM_GET_API_VERSION and KVM_RUN, in turns with a C loop that answers the former."""
    rounds, turn_ms = (3, "60") if quick else (9, "250")
    answer = worlds.compiled("answer", scratch)
    with _host(scratch) as host:
        turns: dict[str, Callable[[], float]] = {
            "version": lambda: host.output("version", "/dev/kvm", turn_ms),
            "run": lambda: host.output("run", "/dev/kvm", turn_ms),
            "C": lambda: _number(
                [str(answer), str(host.client), "version", "/dev/null", turn_ms], host.environment
            ),
        }
        samples = [{name: turn() for name, turn in turns.items()} for _ in range(rounds)]
    version, run, in_c = (statistics.median(one[name] for one in samples) / 1000 for name in turns)
    return (
        Figure(
            "KVM_GET_API_VERSION of a client",
            f"{version:.1f} µs",
            f"under {MOST_CALL_US:g} µs",
            version < MOST_CALL_US,
        ),
        Figure(
            f"the same, beside a C loop that receives and answers it ({in_c:.1f} µs)",
            f"{version / in_c:.2f}x",
            f"at most {RATIO_TO_C:g}x",
            version <= RATIO_TO_C * in_c,
        ),
        Figure(
            f"KVM_RUN of a client up to a scripted exit ({run:.1f} µs), beyond the former",
            f"{run - version:.1f} µs",
            f"within {MOST_EXTRA_RUN_US:g} µs",
            run - version <= MOST_EXTRA_RUN_US,
        ),
    )


def churn(scratch: Path, quick: bool) -> Sequence[Figure]:
    """Makes SEV VMs one after the other where there is one ASID; none may be refused or lost."""
    count = 1_000 if quick else 10_000
    title = f"KVM_CREATE_VM, KVM_SEV_INIT2, close, {count:,} times with one ASID, per second"
    with _host(scratch) as host:
        try:
            each_ns = host.output("sev", "/dev/kvm", str(count))
        except FailedCallError as error:
            return (Figure(title, str(error), "none refused", False),)
        left = _charged_after_a_while(host.cgroups / "misc.current")
    return (
        Figure(title, f"{1e9 / each_ns:,.0f}", "none refused", True),
        Figure("the same: ASIDs charged afterwards", left, "none", left == "0"),
    )


def objects(scratch: Path, _quick: bool) -> Sequence[Figure]:
    """Holds many VMs and vCPUs at once; what the supervisor grew by for each."""
    title = f"a client with {OBJECTS:,} live objects, one VM and its vCPUs"
    with _host(scratch) as host:
        vms = OBJECTS // 2
        try:
            many = _growth(host, 1, OBJECTS - 1)
        except FailedCallError as error:
            return (Figure(title, str(error), "works", False),)
        with_vcpus = _growth(host, vms, 1)
        alone = _growth(host, vms, 0)
    vcpu = (with_vcpus - alone) / vms
    return (
        Figure(title, f"{many / 1e6:.1f} MB", "works", True),
        Figure("memory of the supervisor per VM", f"{alone / vms / 1024:.1f} KiB", "no goal", True),
        Figure("memory of the supervisor per vCPU", f"{vcpu / 1024:.1f} KiB", "no goal", True),
    )


def start(scratch: Path, quick: bool) -> Sequence[Figure]:
    """Times `kvmsim run -- true` as a whole."""
    seconds = []
    with _host(scratch) as host:
        for _ in range(3 if quick else 9):
            before = time.monotonic()
            _call([*host.prefix, "true"], host.environment)
            seconds.append(time.monotonic() - before)
    median = statistics.median(seconds)
    return (
        Figure(
            "`kvmsim run -- true`, start to end",
            f"{median:.2f} s",
            f"under {MOST_START_S:g} s",
            median < MOST_START_S,
        ),
    )


def _growth(host: Host, vms: int, vcpus: int) -> int:
    """Returns the bytes by which the supervisor grew for a client's objects."""
    command = [*host.prefix, str(host.client), "objects", "/dev/kvm", str(vms), str(vcpus)]
    with subprocess.Popen(
        command,
        env=host.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        before = resident_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        if not process.stdout.readline():
            raise FailedCallError(process.stderr.read().strip() or "the client ended")
        growth = resident_bytes(process.pid) - before
        process.stdin.close()
        if process.wait(60) != 0:
            raise FailedCallError(process.stderr.read().strip())
        return growth


def _charged_after_a_while(counters: Path) -> str:
    """Returns the charge of the pool, once what the last client held has gone back."""
    deadline = time.monotonic() + 3
    while True:
        charged = dict(line.split() for line in counters.read_text().splitlines())["sev"]
        if charged == "0" or time.monotonic() > deadline:
            return charged
        time.sleep(0.02)


def _number(command: Sequence[str], environment: dict[str, str]) -> float:
    return float(_call(command, environment))


def _call(command: Sequence[str], environment: dict[str, str]) -> str:
    """Runs a command and returns what it printed.

    Raises:
        FailedCallError: It failed, or took ten minutes.
    """
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FailedCallError(f"{Path(command[0]).name}: no end") from error
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise FailedCallError(words[-1])
    return done.stdout


FIGURES: dict[str, Callable[[Path, bool], Sequence[Figure]]] = {
    "call": call,
    "churn": churn,
    "objects": objects,
    "start": start,
}
