"""The freezer: rows F.6, 128 to 134, and cgroup.freeze (C.3)."""

import os
import select

import pytest
from conformance.calls import eventually, flat, opened, read, write
from conformance.kids import fork_sleeper, start_thread, state_of


@pytest.fixture
def child(d):
    (d / "c").mkdir()
    return d / "c"


def freeze(cgrp, text=b"1"):
    return write(cgrp / "cgroup.freeze", text)


def frozen(cgrp):
    return flat(cgrp / "cgroup.events", "frozen")


def becomes(cgrp, value):
    return eventually(lambda: frozen(cgrp) == value)


def move(pid, cgrp):
    write(cgrp / "cgroup.procs", b"%d" % pid)


def test_row_128_an_empty_cgroup_is_frozen_at_once(d, observe):
    observe("write", freeze(d), 1)
    observe("events", read(d / "cgroup.events"), b"populated 0\nfrozen 1\n")


def test_row_129_a_frozen_parent_freezes_its_child(d, child, kids, observe):
    move(kids().pid, child)
    freeze(d)
    observe("frozen", becomes(child, 1), True)
    observe("own setting", read(child / "cgroup.freeze"), b"0\n")
    observe("parent", becomes(d, 1), True)


def test_row_130_a_setting_without_effect_is_an_event(d, child, observe):
    freeze(d)
    with opened(child / "cgroup.events") as fd:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        os.pread(fd, 100, 0)
        observe("quiet", [bits for _, bits in poll.poll(30)], [])
        freeze(child)
        observe("event", [bits for _, bits in poll.poll(2000)], [select.POLLPRI | select.POLLERR])
        observe("text", os.pread(fd, 100, 0), b"populated 0\nfrozen 1\n")


def test_row_131_a_childs_own_setting_outlives_the_parents(d, child, observe):
    freeze(d)
    freeze(child)
    freeze(d, b"0")
    observe("parent", frozen(d), 0)
    observe("child", frozen(child), 1)


def test_row_132_a_new_cgroup_below_a_frozen_one_is_frozen(d, observe):
    freeze(d)
    (d / "n").mkdir()
    observe("own setting", read(d / "n" / "cgroup.freeze"), b"0\n")
    observe("events", read(d / "n" / "cgroup.events"), b"populated 0\nfrozen 1\n")


def test_row_133_kill_ends_a_frozen_tree(d, kids, observe):
    (d / "a" / "b").mkdir(parents=True)
    made = []
    for cgrp in (d, d / "a", d / "a" / "b"):
        made.append(kids())
        move(made[-1].pid, cgrp)
    freeze(d)
    observe("frozen", becomes(d, 1), True)
    observe("kill", write(d / "cgroup.kill", b"1"), 1)
    observe("died by", [kid.died_by() for kid in made], [9, 9, 9])
    observe("events", read(d / "cgroup.events"), b"populated 0\nfrozen 1\n")


def test_row_134_a_frozen_process_is_in_state_s(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    freeze(d)
    observe("frozen", becomes(d, 1), True)
    observe("state", kid.state, "S")


def test_c3_a_frozen_process_does_not_run(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    freeze(d)
    becomes(d, 1)
    kid.start(os.getpid)
    with pytest.raises(TimeoutError):
        kid.finish(0.1)
    freeze(d, b"0")
    observe("runs again", kid.finish() == kid.pid, True)
    observe("thawed", becomes(d, 0), True)


def test_c3_moving_into_and_out_of_a_frozen_cgroup(d, child, kids, observe):
    kid = kids()
    freeze(child)
    move(kid.pid, child)
    observe("frozen", becomes(child, 1), True)
    kid.start(os.getpid)
    with pytest.raises(TimeoutError):
        kid.finish(0.1)
    move(kid.pid, d)
    observe("runs outside", kid.finish() == kid.pid, True)


def test_c3_moving_between_frozen_cgroups_keeps_it_frozen(d, child, kids, observe):
    (d / "e").mkdir()
    kid = kids()
    move(kid.pid, child)
    for cgrp in (child, d / "e"):
        freeze(cgrp)
    becomes(child, 1)
    move(kid.pid, d / "e")
    observe("frozen", becomes(d / "e", 1), True)
    kid.start(os.getpid)
    with pytest.raises(TimeoutError):
        kid.finish(0.1)


def test_c3_an_ancestor_is_frozen_only_when_told(d, child, kids, observe):
    move(kids().pid, child)
    freeze(child)
    observe("child", becomes(child, 1), True)
    observe("parent", frozen(d), 0)


def test_c3_a_process_entering_a_frozen_tree_is_frozen_when_one_looks(d, kids, observe):
    freeze(d)
    (d / "n").mkdir()
    move(kids().pid, d / "n")
    observe("child", becomes(d / "n", 1), True)
    observe("parent", becomes(d, 1), True)
    observe("populated", flat(d / "cgroup.events", "populated"), 1)


def test_c3_a_forked_child_is_frozen_with_its_parent(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    children = [kid.do(fork_sleeper) for _ in range(3)]
    freeze(d)
    observe("frozen", becomes(d, 1), True)
    freeze(d, b"0")
    observe("thawed", becomes(d, 0), True)
    asleep = eventually(lambda: {state_of(pid) for pid in children} == {"S"})
    observe("children", asleep, True)
    observe("answers", kid.do(os.getpid) == kid.pid, True)


def test_c3_every_thread_is_frozen(d, kids, observe):
    kid = kids()
    for _ in range(5):
        kid.do(start_thread)
    move(kid.pid, d)
    freeze(d)
    observe("frozen", becomes(d, 1), True)
