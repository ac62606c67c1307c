"""Attributes and generic file operations: rows F.2 and the table of C.5."""

import errno
import fcntl
import mmap
import os
import stat
import termios

import pytest
from conformance import syscalls
from conformance.calls import attempt, open_and_close, opened, read, write
from conformance.kids import NOBODY, become
from conformance.observer import NOTED

CORE_FILES = [
    "cgroup.controllers", "cgroup.events", "cgroup.freeze", "cgroup.kill", "cgroup.max.depth",
    "cgroup.max.descendants", "cgroup.procs", "cgroup.stat", "cgroup.subtree_control",
    "cgroup.threads", "cgroup.type",
]  # fmt: skip
# Present on 6.18 where PSI is built in; the specification calls them safe to leave out.
OPTIONAL_FILES = {
    "cgroup.pressure", "cgroup.stat.local", "cpu.pressure", "cpu.stat", "cpu.stat.local",
    "io.pressure", "irq.pressure", "memory.pressure",
}  # fmt: skip
READ_ONLY = {"cgroup.controllers", "cgroup.events", "cgroup.stat"}


def mode(path):
    return oct(stat.S_IMODE(os.stat(path).st_mode))


def owner(path):
    return [os.stat(path).st_uid, os.stat(path).st_gid]


@pytest.fixture
def f(d):
    return d / "cgroup.max.depth"


@pytest.fixture
def nobody(kids):
    kid = kids()
    kid.do(become, NOBODY)
    return kid


def test_row_025_a_fresh_cgroup_has_the_core_files(d, without_controller, observe):
    names = set(os.listdir(d))
    observe("core", sorted(names - OPTIONAL_FILES), CORE_FILES)
    for name in CORE_FILES:
        default = "0o444" if name in READ_ONLY else "0o644"
        observe(f"mode of {name}", mode(d / name), "0o200" if name == "cgroup.kill" else default)
    # The kernel's count depends on its configuration; none of them is needed.
    observe("optional", sorted(names & OPTIONAL_FILES), NOTED)


def test_row_025_fresh_contents(d, without_controller, observe):
    for name, text in {
        "cgroup.type": b"domain\n",
        "cgroup.procs": b"",
        "cgroup.threads": b"",
        "cgroup.controllers": b"",
        "cgroup.subtree_control": b"",
        "cgroup.events": b"populated 0\nfrozen 0\n",
        "cgroup.max.descendants": b"max\n",
        "cgroup.max.depth": b"max\n",
        "cgroup.freeze": b"0\n",
    }.items():
        observe(name, read(d / name), text)


def test_row_026_chmod_persists(d, f, observe):
    os.chmod(f, 0o600)
    observe("file", mode(f), "0o600")
    for bits in (0o700, 0o7777):
        os.chmod(d, bits)
        observe(f"directory {bits:o}", mode(d), oct(bits))


def test_row_027_chown_is_per_file(d, observe):
    os.chown(d, NOBODY, NOBODY)
    os.chown(d / "cgroup.procs", NOBODY, -1)
    observe("directory", owner(d), [NOBODY, NOBODY])
    observe("procs", owner(d / "cgroup.procs"), [NOBODY, 0])
    observe("threads", owner(d / "cgroup.threads"), [0, 0])


def test_row_028_a_new_cgroup_belongs_to_its_creator(d, observe):
    os.chown(d, NOBODY, NOBODY)
    (d / "c").mkdir()
    observe("directory", owner(d / "c"), [0, 0])
    observe("procs", owner(d / "c" / "cgroup.procs"), [0, 0])


def test_row_029_a_setgid_parent_hands_on_its_group(d, observe):
    os.chown(d, -1, NOBODY)
    os.chmod(d, 0o2755)
    (d / "c").mkdir(mode=0o755)
    observe("owner", owner(d / "c"), [0, NOBODY])
    observe("mode", mode(d / "c"), "0o2755")
    observe("control file", owner(d / "c" / "cgroup.procs"), [0, NOBODY])


def test_row_030_times_set_explicitly_stay(f, observe):
    os.utime(f, (1000, 2000))
    write(f, b"5")
    read(f)
    observe("atime", os.stat(f).st_atime, 1000)
    observe("mtime", os.stat(f).st_mtime, 2000)


def test_row_031_truncate_is_accepted_and_ignored(d, f, observe):
    write(f, b"5")
    observe("to 0", attempt(os.truncate, f, 0), "ok")
    observe("to 100", attempt(os.truncate, f, 100), "ok")
    observe("size", os.stat(f).st_size, 0)
    observe("text", read(f), b"5\n")
    observe("read-only file", attempt(os.truncate, d / "cgroup.events", 0), "ok")
    observe("directory", attempt(os.truncate, d, 0), "EISDIR")


def test_row_032_ftruncate_needs_a_descriptor_for_writing(f, observe):
    with opened(f, os.O_WRONLY) as fd:
        observe("writing", attempt(os.ftruncate, fd, 0), "ok")
    with opened(f) as fd:
        observe("reading", attempt(os.ftruncate, fd, 0), "EINVAL")


@pytest.mark.parametrize("flag", ["O_TRUNC", "O_APPEND", "O_SYNC", "O_NONBLOCK", "O_CREAT"])
def test_row_033_open_flags_change_nothing(f, observe, flag):
    write(f, b"1234")
    observe("write", write(f, b"56", getattr(os, flag)), 2)
    observe("text", read(f), b"56\n")


def test_row_034_direct_io_fallocate_and_mmap_are_refused(f, observe):
    observe("O_DIRECT", attempt(open_and_close, f, os.O_RDONLY | os.O_DIRECT), "EINVAL")
    with opened(f, os.O_RDWR) as fd:
        observe("fallocate", attempt(syscalls.fallocate, fd, 0, 0, 10), "EOPNOTSUPP")
        for name in ("shared", "private"):
            flags = getattr(mmap, f"MAP_{name.upper()}")
            observe(
                f"mmap {name}", attempt(syscalls.mmap, fd, 4096, mmap.PROT_READ, flags), "ENODEV"
            )
    with opened(f) as fd:
        flags = mmap.MAP_PRIVATE
        got = attempt(syscalls.mmap, fd, 4096, mmap.PROT_READ, flags)
        observe("mmap private of a descriptor for reading", got, "ENODEV")


def test_row_035_ioctl_and_fsync(d, f, observe):
    with opened(f) as fd:
        observe("TCGETS", attempt(fcntl.ioctl, fd, termios.TCGETS, bytes(64)), "ENOTTY")
        observe("fsync", attempt(os.fsync, fd), "ok")
        observe("FIONREAD", attempt(fcntl.ioctl, fd, termios.FIONREAD, bytes(4)), bytes(4))
    with opened(d) as fd:
        observe("fsync of a directory", attempt(os.fsync, fd), "EINVAL")


def test_row_036_locks_work(f, kids, observe):
    with opened(f, os.O_RDWR) as fd:
        exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
        observe("flock", attempt(fcntl.flock, fd, exclusive), "ok")
        observe("fcntl", attempt(fcntl.lockf, fd, exclusive), "ok")
        observe("flock elsewhere", kids().do(try_lock, str(f), "flock"), "EAGAIN")
        observe("fcntl elsewhere", kids().do(try_lock, str(f), "lockf"), "EAGAIN")


def try_lock(path, kind):
    with opened(path, os.O_RDWR) as fd:
        return attempt(getattr(fcntl, kind), fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_row_037_lseek(f, observe):
    with opened(f) as fd:
        observe("END 0", attempt(os.lseek, fd, 0, os.SEEK_END), 0)
        observe("DATA", attempt(os.lseek, fd, 0, os.SEEK_DATA), "ENXIO")
        observe("HOLE", attempt(os.lseek, fd, 0, os.SEEK_HOLE), "ENXIO")
        observe("SET 2^40", attempt(os.lseek, fd, 2**40, os.SEEK_SET), "EINVAL")
        observe("SET 2^31-1", attempt(os.lseek, fd, 2**31 - 1, os.SEEK_SET), 2**31 - 1)
        observe("SET -1", attempt(os.lseek, fd, -1, os.SEEK_SET), "EINVAL")


def test_row_038_sendfile_and_splice_are_read_and_write(d, f, observe):
    write(f, b"33")
    inward, outward = os.pipe()
    for what, file in (("", f), (" of a live file", d / "cgroup.events")):
        wanted = read(file)
        with opened(file) as fd:
            observe(f"sendfile{what}", attempt(os.sendfile, outward, fd, None, 100), len(wanted))
            observe(f"sent{what}", drained(inward), wanted)
        with opened(file) as fd:
            observe(f"splice out{what}", attempt(os.splice, fd, outward, 100), len(wanted))
            observe(f"spliced{what}", drained(inward), wanted)
    with opened(f, os.O_WRONLY) as fd:
        os.write(outward, b"44")
        observe("splice in", attempt(os.splice, inward, fd, 2), 2)
    observe("stored", read(f), b"44\n")
    os.close(inward)
    os.close(outward)


def drained(fd):
    os.set_blocking(fd, False)
    try:
        return os.read(fd, 1000)
    except BlockingIOError:
        return b""


def test_row_039_copy_file_range_copies_nothing(f, d, observe):
    write(f, b"33")
    with opened(f) as source, opened(d / "cgroup.max.descendants", os.O_WRONLY) as target:
        observe("copied", attempt(os.copy_file_range, source, target, 100), 0)
    observe("target", read(d / "cgroup.max.descendants"), b"max\n")


def test_row_040_nothing_is_executable(d, f, kids, observe):
    observe("X_OK", os.access(f, os.X_OK), False)
    observe("W_OK of a read-only file", os.access(d / "cgroup.events", os.W_OK), True)
    observe("execve", attempt(kids().do, os.execv, str(f), ["x"]), "EACCES")
    os.chmod(f, 0o755)
    observe("X_OK after chmod", os.access(f, os.X_OK), NOTED)


@pytest.mark.parametrize("name", ["user.x", "trusted.x", "security.x"])
def test_row_041_xattrs_of_three_prefixes_are_kept(d, f, observe, name):
    for what, node in (("file", f), ("directory", d)):
        observe(f"set on a {what}", attempt(os.setxattr, node, name, b"value"), "ok")
        observe(f"get from a {what}", attempt(os.getxattr, node, name), b"value")
        observe(f"list of a {what}", attempt(os.listxattr, node), [name])
        observe(f"remove from a {what}", attempt(os.removexattr, node, name), "ok")


def test_row_042_other_xattr_names_are_refused(f, observe):
    for name, wanted in {
        "foo.a": "EOPNOTSUPP",
        "system.a": "EOPNOTSUPP",
        "user.": "EINVAL",
        "system.posix_acl_access": "EINVAL",
        "security.capability": "EINVAL",
    }.items():
        observe(name, attempt(os.setxattr, f, name, b"x"), wanted)
    observe("get ACL", attempt(os.getxattr, f, "system.posix_acl_access"), "EOPNOTSUPP")


def test_row_043_xattr_create_and_replace(f, observe):
    observe("get missing", attempt(os.getxattr, f, "user.a"), "ENODATA")
    observe("replace missing", attempt(os.setxattr, f, "user.a", b"1", os.XATTR_REPLACE), "ENODATA")
    observe("create", attempt(os.setxattr, f, "user.a", b"1", os.XATTR_CREATE), "ok")
    observe("create existing", attempt(os.setxattr, f, "user.a", b"2", os.XATTR_CREATE), "EEXIST")
    observe("value", attempt(os.getxattr, f, "user.a"), b"1")
    observe("replace", attempt(os.setxattr, f, "user.a", b"3", os.XATTR_REPLACE), "ok")
    observe("replaced", attempt(os.getxattr, f, "user.a"), b"3")
    observe("remove missing", attempt(os.removexattr, f, "user.b"), "ENODATA")


def test_row_044_xattr_sizes_are_limited(f, observe):
    observe("65536 bytes", attempt(os.setxattr, f, "user.a", bytes(65536)), "ok")
    observe("65537 bytes", attempt(os.setxattr, f, "user.b", bytes(65537)), "E2BIG")
    observe("second 65536 bytes", attempt(os.setxattr, f, "user.b", bytes(65536)), "ok")
    observe("no bytes", attempt(os.setxattr, f, "user.c", b""), "ok")
    observe("one byte", attempt(os.setxattr, f, "user.d", b"1"), "ENOSPC")
    os.removexattr(f, "user.b")
    observe("after removal", attempt(os.setxattr, f, "user.d", b"1"), "ok")


def test_row_045_user_xattrs_are_limited_in_number(d, f, observe):
    made = 0
    while made < 300 and (got := attempt(os.setxattr, f, f"user.{made}", b"")) == "ok":
        made += 1
    observe("user", made, 128)
    observe("one more", got, "ENOSPC")
    observe("replacing one", attempt(os.setxattr, f, "user.0", b""), "ENOSPC")
    trusted = [attempt(os.setxattr, d, f"trusted.{i}", b"") for i in range(300)]
    observe("trusted", set(trusted), {"ok"})


def test_row_046_xattrs_of_root_are_closed_to_others(f, nobody, observe):
    os.setxattr(f, "trusted.x", b"1")
    for name, wanted in (("user.x", "EACCES"), ("trusted.x", "EPERM")):
        observe(f"set {name}", attempt(nobody.do, os.setxattr, str(f), name, b""), wanted)
    observe("get trusted", attempt(nobody.do, os.getxattr, str(f), "trusted.x"), "ENODATA")


def test_row_047_attributes_of_root_are_closed_to_others(f, nobody, observe):
    path = str(f)
    observe("chmod", attempt(nobody.do, os.chmod, path, 0o666), "EPERM")
    observe("chown", attempt(nobody.do, os.chown, path, NOBODY, NOBODY), "EPERM")
    observe("utime now", attempt(nobody.do, os.utime, path), "EACCES")
    observe("truncate", attempt(nobody.do, os.truncate, path, 0), "EACCES")


def test_c5_stat_of_files_and_directories(d, f, observe):
    for what, node in (("file", f), ("live file", d / "cgroup.procs"), ("directory", d)):
        found = os.stat(node)
        observe(f"size of a {what}", found.st_size, 0)
        observe(f"blocks of a {what}", found.st_blocks, 0)
        observe(f"block size of a {what}", found.st_blksize, 4096)
    observe("links of a file", os.stat(f).st_nlink, 1)


def test_c5_the_directory_inode_is_the_handle(d, observe):
    kind, handle = attempt(syscalls.file_handle, d)
    observe("type", kind, 0xFE)
    observe("id", int.from_bytes(handle[:8], "little") == os.stat(d).st_ino, True)


def test_c1_statfs_shows_the_magic(d, observe):
    observe("magic", hex(syscalls.statfs_type(d)), "0x63677270")
    found = os.statvfs(d)
    observe("block size", found.f_bsize, 4096)
    observe("blocks", [found.f_blocks, found.f_bfree, found.f_files], [0, 0, 0])
    observe("name length", found.f_namemax, 255)


def test_c1_the_root_directory(world, observe):
    found = os.stat(world.root)
    observe("inode", found.st_ino, 1)
    observe("mode", mode(world.root), "0o555")
    names = [name for name in os.listdir(world.root) if os.path.isdir(world.root / name)]
    observe("links", found.st_nlink == 2 + len(names), True)
    for name in ("cgroup.type", "cgroup.events", "cgroup.freeze", "cgroup.kill"):
        observe(name, attempt(os.stat, world.root / name), "ENOENT")
    for name in ("cgroup.procs", "cgroup.stat", "cgroup.max.depth", "cgroup.subtree_control"):
        observe(name, (world.root / name).exists(), True)


def test_c5_xattrs_are_listed_by_name_downwards_and_not_inherited(d, observe):
    for name in ("user.m", "user.ab", "trusted.q", "user.z", "security.b", "user.a"):
        os.setxattr(d, name, b"")
    # Linux 6.2 fs/xattr.c keeps them in a tree sorted by name and walks it from the right.
    wanted = ["user.z", "user.m", "user.ab", "user.a", "trusted.q", "security.b"]
    observe("order", os.listxattr(d), wanted)
    (d / "c").mkdir()
    observe("child", os.listxattr(d / "c"), [])


def test_c5_chmod_is_enforced(f, nobody, observe):
    os.chmod(f, 0o600)
    observe("read", nobody.do(read, str(f)), "EACCES")
    os.chmod(f, 0o666)
    observe("write", nobody.do(write, str(f), b"3"), 1)


def test_c5_directory_times_move_on_mkdir(d, observe):
    os.utime(d, (1000, 2000))
    (d / "c").mkdir()
    observe("moved by mkdir", os.stat(d).st_mtime > 2000, True)


def test_error_names_are_those_of_the_specification():
    assert attempt(raise_eopnotsupp) == "EOPNOTSUPP"


def raise_eopnotsupp():
    raise OSError(errno.EOPNOTSUPP, "")
