"""The first session of a user, typed into a shell as it is written in the README."""

import json
import subprocess

SCRIPT = r"""
set -e
kvmsim up ~/host --preset lab-amd
cd ~/host/sys/fs/cgroup
say capacity "$(cat misc.capacity)"
say stat "$(cat encryption_ids.sev.stat)"
echo "+encryption_ids +misc +bus_lock" > cgroup.subtree_control
mkdir tenant; echo "sev 2" > tenant/misc.max
kvmsim vm start a --type sev --cgroup /tenant
kvmsim vm start b --type sev --cgroup /tenant
set +e
kvmsim vm start c --type sev --cgroup /tenant; say refused $?
set -e
say used "$(cat tenant/misc.current tenant/misc.events tenant/encryption_ids.sev.current)"
kvmsim vm start noisy --cgroup /tenant --guest "buslock rate=5000"
sleep 0.3
say before "$(kvmsim vm show noisy --json)"
echo "100 1000000" > tenant/bus_lock.max
sleep 1
say limit "$(cat tenant/bus_lock.max)"
say throttled "$(cat tenant/bus_lock.stat)"
say after "$(kvmsim vm show noisy --json)"
echo $$ > tenant/cgroup.procs; say procs "$(cat tenant/cgroup.procs)"; say shell $$
kvmsim vm stop a
say left "$(cat tenant/misc.current)"
kvmsim vm stop b noisy
echo $$ > cgroup.procs
rmdir tenant
kvmsim down ~/host
say done yes
"""
# Records are told apart by a byte that no control file shows.
SAY = 'say() { printf \'%s\\037%s\\036\' "$1" "$2"; }\n'


def test_transcript_works_as_written(shell, fuse):
    done = subprocess.run(
        ["bash", "-c", SAY + SCRIPT],
        cwd=shell.home,
        env=shell.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = dict(record.split("\037") for record in done.stdout.split("\036") if record)
    assert (done.returncode, said.get("done")) == (0, "yes"), done.stderr
    refusal, *notes = done.stderr.splitlines()
    assert refusal == ('kvmsim: vm c: no SEV ASID: cgroup /tenant is at misc.max "sev 2" (EBUSY)')
    assert all("still in use by bash" in note for note in notes)
    assert said["refused"] == "75"
    assert said["capacity"] == "sev 10\nsev_es 5"
    assert said["stat"] == "total 10\nused 0"
    assert said["used"] == "sev 2\nsev_es 0\nsev.max 1\nsev_es.max 0\n2"
    assert said["limit"] == "100 1000000"
    before, after = json.loads(said["before"]), json.loads(said["after"])
    assert before["bus_locks"] > 300
    # A full bucket of 100, then 100 a second, and slack for a slow machine.
    assert after["bus_locks"] - before["bus_locks"] < 1500
    assert after["throttled_ns"] > 0
    stat = dict(line.split() for line in said["throttled"].splitlines())
    assert int(stat["nr_throttled"]) > 0
    assert said["shell"] in said["procs"].split()
    assert said["left"] == "sev 1\nsev_es 0"
