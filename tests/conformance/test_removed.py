"""A removed cgroup and what is still open of it: rows F.7 and section 0.4."""

import os
import select

import pytest
from conformance.calls import attempt, open_and_close, opened, write

FILES = [
    "cgroup.procs", "cgroup.max.depth", "cgroup.subtree_control", "cgroup.freeze", "cgroup.type",
    "cgroup.kill",
]  # fmt: skip


@pytest.fixture
def gone(d):
    """A cgroup R with its directory and files open, removed when called."""
    (d / "r").mkdir()
    fds = {name: os.open(d / "r" / name, os.O_RDWR) for name in FILES}
    fds["cgroup.events"] = os.open(d / "r" / "cgroup.events", os.O_RDONLY)
    fds["."] = os.open(d / "r", os.O_RDONLY | os.O_DIRECTORY)
    yield lambda: (os.rmdir(d / "r"), fds)[1]
    for fd in fds.values():
        os.close(fd)


@pytest.mark.parametrize("name", FILES)
def test_row_135_read_and_write_say_enodev(gone, observe, name):
    fd = gone()[name]
    observe("pread", attempt(os.pread, fd, 100, 0), "ENODEV")
    observe("read", attempt(os.read, fd, 100), "ENODEV")
    observe("write", attempt(os.write, fd, b"1"), "ENODEV")


def test_row_135_a_file_read_before_says_enodev_when_it_is_generated_again(gone, d, observe):
    with opened(d / "r" / "cgroup.max.depth") as fd:
        os.read(fd, 100)
        gone()
        observe("read at the end", attempt(os.read, fd, 100), "ENODEV")
        observe("pread", attempt(os.pread, fd, 100, 0), "ENODEV")


def test_row_136_lengths_on_a_removed_file(gone, observe):
    fd = gone()["cgroup.max.depth"]
    observe("write of 5000 bytes", attempt(os.write, fd, b"x" * 5000), "E2BIG")
    observe("read of 0 bytes", attempt(os.read, fd, 0), b"")
    observe("write of 0 bytes", attempt(os.write, fd, b""), "ENODEV")


@pytest.mark.parametrize("name", ["cgroup.max.depth", "cgroup.events"])
def test_row_137_the_rest_of_a_half_read_file_is_delivered(gone, d, observe, name):
    with opened(d / "r" / name) as fd:
        observe("first", len(os.read(fd, 2)), 2)
        gone()
        rest = {"cgroup.max.depth": b"x\n", "cgroup.events": b"pulated 0\nfrozen 0\n"}
        observe("rest", attempt(os.read, fd, 100), rest[name])


def test_row_138_attributes_of_removed_nodes(gone, observe):
    fds = gone()
    fd = fds["cgroup.max.depth"]
    observe("links of a file", attempt(lambda: os.fstat(fd).st_nlink), 1)
    observe("links of a directory", attempt(lambda: os.fstat(fds["."]).st_nlink), 2)
    observe("fchmod", attempt(os.fchmod, fd, 0o600), "ok")
    observe("mode", attempt(lambda: os.fstat(fd).st_mode & 0o777), 0o600)
    observe("lseek", attempt(os.lseek, fd, 0, os.SEEK_SET), "ENODEV")


def test_row_139_a_removed_directory_is_empty(gone, kids, d, observe):
    kid = kids()
    kid.do(os.chdir, str(d / "r"))
    fd = gone()["."]
    creating = os.O_WRONLY | os.O_CREAT
    observe("listdir", attempt(os.listdir, fd), [])
    observe("openat", attempt(open_and_close, "cgroup.procs", os.O_RDONLY, dir_fd=fd), "ENOENT")
    observe("openat O_CREAT", attempt(open_and_close, "new", creating, dir_fd=fd), "ENOENT")
    observe("mkdirat", attempt(os.mkdir, "x", dir_fd=fd), "ENOENT")
    observe("getcwd", attempt(kid.do, os.getcwd), "ENOENT")
    observe("mkdir in a cwd", attempt(kid.do, os.mkdir, "x"), "ENOENT")


def test_row_140_the_parent_can_be_reached(gone, d, observe):
    fds = gone()
    with opened("..", dir_fd=fds["."]) as parent:
        observe("parent", os.fstat(parent).st_ino == os.stat(d).st_ino, True)
    again = f"/proc/self/fd/{fds['cgroup.procs']}"
    observe("file again", attempt(open_and_close, again, os.O_RDONLY), "ENODEV")
    observe("file again for writing", attempt(open_and_close, again, os.O_WRONLY), "ENODEV")


def test_row_141_poll_is_ready_at_once(gone, observe):
    poll = select.poll()
    poll.register(gone()["cgroup.events"], select.POLLIN | select.POLLPRI)
    wanted = select.POLLIN | select.POLLPRI | select.POLLERR
    observe("bits", [bits for _, bits in poll.poll(2000)], [wanted])


def test_row_141_a_waiting_poll_is_woken(gone, observe):
    with_events = gone
    poll = select.epoll()
    (fds,) = (with_events(),)
    poll.register(fds["cgroup.events"], select.EPOLLPRI)
    observe("bits", [bits for _, bits in poll.poll(2)], [select.EPOLLPRI | select.EPOLLERR])
    poll.close()


def test_row_142_the_same_name_again_does_not_revive(gone, d, observe):
    fds = gone()
    (d / "r").mkdir()
    observe("pread", attempt(os.pread, fds["cgroup.procs"], 100, 0), "ENODEV")
    observe("write", attempt(os.write, fds["cgroup.max.depth"], b"3"), "ENODEV")
    observe("new one", write(d / "r" / "cgroup.max.depth", b"3"), 1)
