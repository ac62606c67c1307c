"""The state machine of cgroup.type: rows F.6, 119 to 127, and C.10."""

import os

import pytest
from conformance.calls import attempt, numbers, read, write
from conformance.kids import start_thread


@pytest.fixture
def tree(d):
    """A with a threaded B, an invalid B/C and an invalid X."""
    a, b, c, x = d / "A", d / "A" / "B", d / "A" / "B" / "C", d / "A" / "X"
    for cgrp in (a, b, c, x):
        cgrp.mkdir()
    assert write(b / "cgroup.type", b"threaded") == 8
    return a, b, c, x


def kind(cgrp):
    return read(cgrp / "cgroup.type")


def make_threaded(cgrp):
    return write(cgrp / "cgroup.type", b"threaded")


def move(number, cgrp, name="cgroup.procs"):
    result = write(cgrp / name, b"%d" % number)
    return "ok" if result == len(str(number)) else result


def test_row_119_types_around_a_threaded_cgroup(tree, observe):
    kinds = [b"domain threaded\n", b"threaded\n", b"domain invalid\n", b"domain invalid\n"]
    for name, cgrp, wanted in zip("ABCX", tree, kinds, strict=True):
        observe(name, kind(cgrp), wanted)


def test_row_120_process_files_by_type(tree, kids, observe):
    _, b, c, x = tree
    pid = kids().pid
    observe("write into C", move(pid, c), "EOPNOTSUPP")
    observe("write into X", move(pid, x), "EOPNOTSUPP")
    observe("procs of C", read(c / "cgroup.procs"), b"")
    observe("procs of B", read(b / "cgroup.procs"), "EOPNOTSUPP")
    observe("threads of B", read(b / "cgroup.threads"), b"")


def test_row_121_a_process_joins_a_threaded_cgroup_through_its_root(tree, kids, observe):
    a, b, _, _ = tree
    pid = kids().pid
    observe("move", move(pid, b), "ok")
    observe("procs of A", numbers(a / "cgroup.procs") == [pid], True)
    observe("threads of B", numbers(b / "cgroup.threads") == [pid], True)
    observe("threads of A", numbers(a / "cgroup.threads"), [])


def test_row_122_a_threaded_cgroup_cannot_be_killed_alone(tree, observe):
    _, b, _, _ = tree
    observe("1", write(b / "cgroup.kill", b"1"), "EOPNOTSUPP")
    observe("2", write(b / "cgroup.kill", b"2"), "ERANGE")


def test_row_123_threads_move_inside_their_domain(tree, d, kids, observe):
    a, b, c, _ = tree
    make_threaded(c)
    kid = kids()
    tid = kid.do(start_thread)
    move(kid.pid, b)
    observe("to C", move(tid, c, "cgroup.threads"), "ok")
    observe("threads of C", numbers(c / "cgroup.threads") == [tid], True)
    observe("threads of B", numbers(b / "cgroup.threads") == [kid.pid], True)
    observe("procs of A", numbers(a / "cgroup.procs") == [kid.pid], True)
    observe("to D", move(tid, d, "cgroup.threads"), "EOPNOTSUPP")
    observe("to A", move(tid, a, "cgroup.threads"), "ok")


def test_row_124_a_populated_cgroup_stays_a_domain(d, kids, observe):
    p, q = d / "P", d / "P" / "Q"
    q.mkdir(parents=True)
    move(kids().pid, p)
    observe("populated", make_threaded(p), "EOPNOTSUPP")
    observe("empty below populated", make_threaded(q), 8)
    observe("type", kind(p), b"domain threaded\n")


def test_row_125_domain_controllers_stop_at_thread_roots(with_controller, world, d, observe):
    on = b"+" + world.controller.encode()
    write(d / "cgroup.subtree_control", on)
    p = d / "P"
    for name in ("Q", "R"):
        (p / name).mkdir(parents=True)
    make_threaded(p / "Q")
    observe("type of R", kind(p / "R"), b"domain invalid\n")
    observe("thread root", write(p / "cgroup.subtree_control", on), "EOPNOTSUPP")
    observe("threaded", write(p / "Q" / "cgroup.subtree_control", on), "ENOENT")
    observe("invalid", write(p / "R" / "cgroup.subtree_control", on), "ENOENT")
    observe("controllers of threaded", read(p / "Q" / "cgroup.controllers"), b"")


def test_row_126_domain_controllers_keep_a_cgroup_a_domain(with_controller, world, d, observe):
    write(d / "cgroup.subtree_control", b"+" + world.controller.encode())
    (d / "S" / "t").mkdir(parents=True)
    write(d / "S" / "cgroup.subtree_control", b"+" + world.controller.encode())
    observe("child", make_threaded(d / "S" / "t"), "EOPNOTSUPP")
    observe("itself", make_threaded(d / "S"), "EOPNOTSUPP")


def test_row_127_an_invalid_cgroup(tree, kids, observe):
    *_, v = tree
    kid = kids()
    kid.kill()
    kid.reap()
    observe("word", write(v / "cgroup.procs", b"abc"), "EINVAL")
    observe("dead pid", write(v / "cgroup.procs", b"%d" % kid.pid), "ESRCH")
    observe("0", kids().do(write, str(v / "cgroup.procs"), b"0"), "EOPNOTSUPP")
    observe("kill", write(v / "cgroup.kill", b"1"), 1)
    observe("freeze", write(v / "cgroup.freeze", b"1"), 1)


def test_c10_threaded_again_is_accepted_and_there_is_no_way_back(tree, observe):
    _, b, _, _ = tree
    observe("again", make_threaded(b), 8)
    observe("back", write(b / "cgroup.type", b"domain"), "EINVAL")


def test_c10_without_threaded_children_the_root_is_a_domain_again(tree, observe):
    a, b, c, x = tree
    os.rmdir(c)
    os.rmdir(b)
    observe("root", kind(a), b"domain\n")
    observe("sibling", kind(x), b"domain\n")


def test_c10_a_threaded_child_of_the_root_leaves_others_alone(d, world, observe):
    other = world.root / f"{d.name}-other"
    other.mkdir()
    try:
        observe("threaded", make_threaded(d), 8)
        observe("other", kind(other), b"domain\n")
        observe("child", attempt(os.mkdir, d / "c"), "ok")
        observe("type of the child", kind(d / "c"), b"domain invalid\n")
        observe("child threaded", make_threaded(d / "c"), 8)
        observe("type of the child threaded", kind(d / "c"), b"threaded\n")
    finally:
        other.rmdir()


def test_c10_below_an_invalid_domain_nothing_becomes_threaded(tree, observe):
    *_, x = tree
    (x / "y").mkdir()
    observe("child of invalid", make_threaded(x / "y"), "EOPNOTSUPP")
    observe("invalid itself", make_threaded(x), 8)


def test_c10_a_domain_child_with_processes_keeps_the_parent_from_being_a_thread_root(
    d, kids, observe
):
    for name in ("B", "X"):
        (d / name).mkdir()
    move(kids().pid, d / "X")
    observe("sibling of a populated domain", make_threaded(d / "B"), "EOPNOTSUPP")


def test_c10_a_populated_descendant_keeps_a_cgroup_a_domain(d, kids, observe):
    (d / "B" / "C").mkdir(parents=True)
    move(kids().pid, d / "B" / "C")
    observe("threaded", make_threaded(d / "B"), "EOPNOTSUPP")


def test_c10_a_process_leaves_a_threaded_cgroup_as_a_whole(tree, d, kids, observe):
    a, b, c, _ = tree
    make_threaded(c)
    kid = kids()
    tid = kid.do(start_thread)
    move(kid.pid, b)
    move(tid, c, "cgroup.threads")
    (d / "E").mkdir()
    observe("move", move(tid, d / "E"), "ok")
    observe("procs", numbers(d / "E" / "cgroup.procs") == [kid.pid], True)
    tids = sorted([kid.pid, tid])
    observe("threads", sorted(numbers(d / "E" / "cgroup.threads")) == tids, True)
    observe("left behind", numbers(a / "cgroup.procs"), [])
