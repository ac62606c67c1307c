import os

import pytest

from cgfs.procs.namespaces import Namespaces

# Makes a pid namespace and prints the pid that its first process has outside of it.
NAMESPACE = """
import ctypes, os, sys
assert ctypes.CDLL(None).unshare(0x20000000) == 0
pid = os.fork()
if pid:
    print(pid, flush=True)
    os.waitpid(pid, 0)
else:
    sys.stdin.readline()
"""
# Two of them, one in the other; prints the pid of the innermost process in the outer one.
NESTED = """
import ctypes, os, sys
def below():
    assert ctypes.CDLL(None).unshare(0x20000000) == 0
    return os.fork()
if pid := below():
    os.waitpid(pid, 0)
elif pid := below():
    print(pid, flush=True)
    os.waitpid(pid, 0)
else:
    sys.stdin.readline()
"""


@pytest.fixture
def inner(start):
    """A process that is pid 1 of a namespace of its own; its pid here."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a pid namespace")
    child = start.python(NAMESPACE)
    return int(child.said)


def test_caller_of_our_own_namespace_uses_our_numbers():
    names = Namespaces()
    assert names.from_caller(os.getpid(), os.getppid()) == os.getppid()
    assert names.to_caller(os.getpid(), os.getppid()) == os.getppid()


def test_number_of_no_task_is_none():
    assert Namespaces().from_caller(os.getpid(), 99_999_999) is None


def test_inner_number_is_translated_to_ours(inner):
    assert Namespaces().from_caller(inner, 1) == inner


def test_inner_number_that_is_not_used_there_is_none(inner):
    assert Namespaces().from_caller(inner, 4_000_000) is None


def test_our_process_is_invisible_inside(inner):
    names = Namespaces()
    assert names.to_caller(inner, os.getpid()) == 0
    assert names.to_caller(inner, inner) == 1


def test_sibling_namespaces_do_not_see_each_other(inner, start):
    other = start.python(NAMESPACE)
    names = Namespaces()
    assert names.to_caller(inner, int(other.said)) == 0
    assert names.from_caller(inner, 1) == inner
    names.forget()
    assert names.from_caller(int(other.said), 1) == int(other.said)


def test_deeper_namespace_is_seen_from_the_one_above(start):
    if os.geteuid() != 0:
        pytest.skip("needs root to make a pid namespace")
    child = start.python(NESTED)
    assert child.said == "2"  # the number of the innermost in the namespace between
    middle, innermost = _chain(child.pid)
    names = Namespaces()
    assert names.to_caller(middle, innermost) == 2
    assert names.from_caller(middle, 2) == innermost
    names.forget()
    assert names.to_caller(innermost, middle) == 0


def test_caller_from_outside_our_namespace_sees_nothing():
    names = Namespaces()
    assert names.from_caller(0, 1) is None
    assert names.to_caller(0, os.getpid()) == 0


def _chain(pid):
    found = []
    for _ in range(2):
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            pid = int(children.read().split()[0])
        found.append(pid)
    return found
