"""Linux's own selftests of the cgroup core, kill and freezer (section E), as far as a mount goes.

They wait for one inotify event on cgroup.events and then look once.
"""

import contextlib
import ctypes
import os
import signal
import time

import pytest
from conformance.calls import attempt, eventually, flat, numbers, read, write
from conformance.inotify import watching
from conformance.kids import fork_sleeper, start_thread, state_of

EVENT_S = 10.0
MODIFY = 0x2
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17
_WALL = 0x40000000


@contextlib.contextmanager
def event_on(cgrp):
    """Waits at the end of the block for the first event on cgroup.events since its begin."""
    with watching() as watcher:
        watcher.watch(cgrp / "cgroup.events", "events", MODIFY)
        yield
        assert watcher.events(settle_s=0, wait_s=EVENT_S), "no event"


def freeze(cgrp, value):
    assert write(cgrp / "cgroup.freeze", b"%d" % value) == 1


def frozen(*cgrps):
    return [flat(cgrp / "cgroup.events", "frozen") for cgrp in cgrps]


def become_frozen(cgrps, wanted):
    """Whether they show it; on a busy machine Linux takes its time to freeze who has moved."""
    return eventually(lambda: frozen(*cgrps) == wanted)


def populated(*cgrps):
    return [flat(cgrp / "cgroup.events", "populated") for cgrp in cgrps]


def move(pid, cgrp):
    return write(cgrp / "cgroup.procs", b"%d" % pid)


def nested(d, depth):
    path = [d]
    for level in range(depth - 1):
        path.append(path[-1] / f"level{level}")
        path[-1].mkdir()
    return path


def crowd(kid, size):
    return [kid.do(fork_sleeper) for _ in range(size)]


def settled():
    """Lets the 10 ms in which events are merged pass, so that the next one comes at once."""
    time.sleep(0.03)


def test_core_populated_follows_a_process_up_the_tree(d, kids, observe):
    path = nested(d, 4)
    kid = kids()
    observe("before", populated(*path), [0, 0, 0, 0])
    move(kid.pid, path[2])
    observe("inside the third", populated(*path), [1, 1, 1, 0])
    kid.do(write, str(d.parent / "cgroup.procs"), b"0")
    observe("outside", populated(*path), [0, 0, 0, 0])


def test_core_proc_migration_takes_all_threads(d, kids, observe):
    for name in ("src", "dst"):
        (d / name).mkdir()
    kid = kids()
    kid.do(write, str(d / "src" / "cgroup.procs"), b"0")
    for _ in range(13):
        kid.do(start_thread)
    observe("in src", len(numbers(d / "src" / "cgroup.threads")), 14)
    observe("move", kid.do(write, str(d / "dst" / "cgroup.procs"), b"0"), 1)
    observe("in dst", len(numbers(d / "dst" / "cgroup.threads")), 14)
    observe("left in src", read(d / "src" / "cgroup.threads"), b"")


@pytest.mark.parametrize("attempt_number", range(5))
def test_core_destroy_before_the_zombie_is_reaped(d, kids, observe, attempt_number):
    (d / "c").mkdir()
    kid = kids()
    move(kid.pid, d / "c")
    os.kill(kid.pid, signal.SIGKILL)
    observe("empty", eventually(lambda: read(d / "c" / "cgroup.procs") == b""), True)
    observe("rmdir", attempt(os.rmdir, d / "c"), "ok")
    observe("state", kid.state, "Z")


def test_core_internal_process_constraint(with_controller, world, d, kids, observe):
    (d / "child").mkdir()
    write(d / "cgroup.subtree_control", b"+" + world.controller.encode())
    observe("parent", kids().do(write, str(d / "cgroup.procs"), b"0"), "EBUSY")
    observe("child", kids().do(write, str(d / "child" / "cgroup.procs"), b"0"), 1)


def test_kill_simple(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    pids = [kid.pid, *crowd(kid, 99)]
    observe("listed", sorted(numbers(d / "cgroup.procs")) == sorted(pids), True)
    observe("populated", populated(d), [1])
    with event_on(d):
        write(d / "cgroup.kill", b"1")
    observe("killed", [kid.died_by(), *populated(d)], [9, 0])
    observe("all", eventually(lambda: all(state_of(pid) in "ZX-" for pid in pids)), True)


def test_kill_tree(d, kids, observe):
    path = nested(d, 10)
    made = [kids() for _ in range(5)]
    for kid, index in zip(made, (0, 4, 4, 8, 9), strict=True):
        move(kid.pid, path[index])
    with event_on(d):
        write(d / "cgroup.kill", b"1")
    observe("died by", [kid.died_by() for kid in made], [9] * 5)
    observe("populated", populated(*path), [0] * 10)


def test_kill_forkbomb(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    kid.start(multiply)
    observe("grown", eventually(lambda: len(numbers(d / "cgroup.procs")) > 30), True)
    with event_on(d):
        write(d / "cgroup.kill", b"1")
    observe("died by", kid.died_by(), 9)
    observe("empty", eventually(lambda: populated(d) == [0]), True)
    time.sleep(0.1)
    observe("stays empty", [populated(d), read(d / "cgroup.procs")], [[0], b""])


def multiply():
    """Forks for half a minute, at most some hundred processes, each forking further ones."""
    for _ in range(7):
        os.fork()
        time.sleep(0.005)
    time.sleep(30)
    os._exit(0)


def test_freezer_simple(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    crowd(kid, 99)
    observe("listed", len(numbers(d / "cgroup.procs")), 100)
    observe("at first", frozen(d), [0])
    settled()
    with event_on(d):
        freeze(d, 1)
    observe("frozen", frozen(d), [1])
    settled()
    with event_on(d):
        freeze(d, 0)
    observe("thawed", frozen(d), [0])


def test_freezer_tree(d, kids, observe):
    a, b, c = d / "a", d / "a" / "b", d / "a" / "c"
    for cgrp in (a, b, c):
        cgrp.mkdir()
    for cgrp in (a, b, b, c):
        move(kids().pid, cgrp)
    settled()
    with event_on(b):
        freeze(b, 1)
    observe("b only", frozen(a, b, c), [0, 1, 0])
    settled()
    with event_on(a):
        freeze(a, 1)
    observe("all", frozen(d, a, b, c), [0, 1, 1, 1])
    settled()
    with event_on(b):
        freeze(b, 0)
    observe("b stays", frozen(a, b, c), [1, 1, 1])
    settled()
    with event_on(a):
        freeze(a, 0)
    observe("none", frozen(a, b, c), [0, 0, 0])


def test_freezer_forkbomb(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    kid.start(multiply)
    observe("grown", eventually(lambda: len(numbers(d / "cgroup.procs")) > 10), True)
    freeze(d, 1)
    observe("frozen", become_frozen((d,), [1]), True)
    size = len(numbers(d / "cgroup.procs"))
    time.sleep(0.1)
    observe("does not grow", len(numbers(d / "cgroup.procs")) == size, True)
    write(d / "cgroup.kill", b"1")
    observe("empty", eventually(lambda: populated(d) == [0]), True)


def test_freezer_mkdir(d, kids, observe):
    freeze(d, 1)
    (d / "child").mkdir()
    move(kids().pid, d / "child")
    observe("both", become_frozen((d, d / "child"), [1, 1]), True)


def test_freezer_rmdir(d, kids, observe):
    (d / "p" / "child").mkdir(parents=True)
    kid = kids()
    move(kid.pid, d / "p" / "child")
    freeze(d / "p", 1)
    observe("frozen", become_frozen((d / "p",), [1]), True)
    kid.kill()
    (d / "p" / "child").rmdir()
    observe("parent stays", become_frozen((d / "p",), [1]), True)
    (d / "p" / "child").mkdir()
    observe("new child", frozen(d / "p" / "child"), [1])


def test_freezer_migrate(d, kids, observe):
    a, b = d / "a", d / "b"
    a.mkdir()
    b.mkdir()
    kid = kids()
    move(kid.pid, a)
    freeze(b, 1)
    settled()
    for label, source, target, wanted in (
        ("running to frozen", a, b, [0, 1]),
        ("frozen to running", b, a, [0, 1]),
    ):
        move(kid.pid, target)
        observe(label, become_frozen((a, b), wanted), True)
        observe(f"{label}: left", read(source / "cgroup.procs"), b"")
    freeze(a, 1)
    observe("both", become_frozen((a, b), [1, 1]), True)
    move(kid.pid, b)
    observe("frozen to frozen", become_frozen((a, b), [1, 1]), True)


def ptrace(request, pid):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, pid, None, None) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def test_freezer_ptrace(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    freeze(d, 1)
    observe("frozen", become_frozen((d,), [1]), True)
    ptrace(PTRACE_SEIZE, kid.pid)
    ptrace(PTRACE_INTERRUPT, kid.pid)
    os.waitpid(kid.pid, _WALL)
    observe("traced", frozen(d), [1])
    ptrace(PTRACE_DETACH, kid.pid)
    observe("let go", frozen(d), [1])


def test_freezer_ptraced(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    ptrace(PTRACE_SEIZE, kid.pid)
    ptrace(PTRACE_INTERRUPT, kid.pid)
    os.waitpid(kid.pid, _WALL)
    settled()
    with event_on(d):
        freeze(d, 1)
    observe("frozen", frozen(d), [1])
    settled()
    with event_on(d):
        freeze(d, 0)
    observe("thawed", frozen(d), [0])
    ptrace(PTRACE_DETACH, kid.pid)


def test_freezer_stopped(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    kid.kill(signal.SIGSTOP)
    observe("stopped", eventually(lambda: kid.state == "T"), True)
    settled()
    with event_on(d):
        freeze(d, 1)
    observe("frozen", frozen(d), [1])
    settled()
    with event_on(d):
        freeze(d, 0)
    observe("still stopped", kid.state, "T")


def test_freezer_vfork(d, kids, observe):
    kid = kids()
    move(kid.pid, d)
    kid.start(vfork_sleeper)
    observe("two", eventually(lambda: len(numbers(d / "cgroup.procs")) == 2), True)
    freeze(d, 1)
    observe("frozen", become_frozen((d,), [1]), True)


def vfork_sleeper():
    """Becomes a parent that waits for a child made by vfork, which sleeps."""
    clone_vfork_vm = 0x4000 | 0x100
    stack = ctypes.create_string_buffer(1 << 16)
    top = ctypes.c_void_p((ctypes.addressof(stack) + (1 << 16)) & ~15)
    libc = ctypes.CDLL(None)
    pause = ctypes.cast(libc.pause, ctypes.c_void_p)
    libc.clone(pause, top, clone_vfork_vm | signal.SIGCHLD, None)
