"""Directories: rows F.1 and the table of C.4."""

import os
import stat

import pytest
from conformance import syscalls
from conformance.calls import attempt, open_and_close, opened
from conformance.kids import NOBODY, become

ODD_NAMES = [
    b"a.b", b"cgroup.foo", b" ", b"a b", b"a\tb", b"a:b", b".hidden", b"...", b"tasks", b"\xff\xfe"
]  # fmt: skip


@pytest.fixture
def umask_0():
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path):
    return oct(stat.S_IMODE(os.stat(path).st_mode))


def test_row_001_mkdir_of_an_existing_cgroup_says_eexist(d, observe):
    observe("new", attempt(os.mkdir, d / "c"), "ok")
    observe("existing", attempt(os.mkdir, d / "c"), "EEXIST")


def test_row_002_mkdir_name_with_a_newline_says_einval(d, observe):
    observe("newline inside", attempt(os.mkdir, d / "a\nb"), "EINVAL")
    observe("newline at the end", attempt(os.mkdir, d / "a\n"), "EINVAL")


def test_row_003_mkdir_takes_odd_names(d, world, observe):
    for name in [*ODD_NAMES, os.fsencode(world.limit)]:
        (d / "off").mkdir(exist_ok=True)
        path = os.fsencode(d / "off") + b"/" + name
        label = (
            "file of a controller that is off" if name == os.fsencode(world.limit) else repr(name)
        )
        observe(label, attempt(os.mkdir, path), "ok")
        observe(f"{label} listed", name in os.listdir(os.fsencode(d / "off")), True)
        observe(f"{label} removed", attempt(os.rmdir, path), "ok")


@pytest.mark.parametrize("name", ["cgroup.procs", "cgroup.events"])
def test_row_004_mkdir_named_as_a_control_file_says_eexist(d, observe, name):
    observe("mkdir", attempt(os.mkdir, d / name), "EEXIST")


@pytest.mark.parametrize("length", [255, 256, 1024])
def test_row_005_mkdir_takes_long_names(d, observe, length):
    observe("mkdir", attempt(os.mkdir, d / ("n" * length)), "ok")
    observe("listed", "n" * length in os.listdir(d), True)
    observe("rmdir", attempt(os.rmdir, d / ("n" * length)), "ok")


def test_row_006_mkdir_of_dot_and_dot_dot_says_eexist(d, observe):
    observe("dot", attempt(os.mkdir, f"{d}/."), "EEXIST")
    observe("dot dot", attempt(os.mkdir, f"{d}/.."), "EEXIST")


def test_row_007_mkdir_below_nothing_or_a_file(d, observe):
    observe("below nothing", attempt(os.mkdir, d / "none" / "x"), "ENOENT")
    observe("below a file", attempt(os.mkdir, d / "cgroup.procs" / "x"), "ENOTDIR")


@pytest.mark.parametrize(
    ("asked", "given"), [(0o700, 0o700), (0o1777, 0o1777), (0, 0), (0o6777, 0o777)]
)
def test_row_008_mkdir_mode_keeps_sticky_and_drops_set_id(d, umask_0, observe, asked, given):
    os.mkdir(d / "c", asked)
    observe("mode", mode(d / "c"), oct(given))
    observe("procs", mode(d / "c" / "cgroup.procs"), "0o644")
    observe("kill", mode(d / "c" / "cgroup.kill"), "0o200")
    observe("events", mode(d / "c" / "cgroup.events"), "0o444")


def test_row_008_mkdir_mode_obeys_the_umask(d, observe):
    before = os.umask(0o027)
    try:
        os.mkdir(d / "c", 0o777)
    finally:
        os.umask(before)
    observe("mode", mode(d / "c"), "0o750")
    observe("control file", mode(d / "c" / "cgroup.procs"), "0o644")


def test_row_009_nlink_is_two_and_one_per_child(d, observe):
    observe("none", os.stat(d).st_nlink, 2)
    for name in "abcd":
        (d / name).mkdir()
    observe("four", os.stat(d).st_nlink, 6)
    (d / "a").rmdir()
    observe("three", os.stat(d).st_nlink, 5)


def test_row_010_a_name_made_again_has_another_inode(d, observe):
    (d / "c").mkdir()
    first = os.stat(d / "c").st_ino
    (d / "c").rmdir()
    (d / "c").mkdir()
    observe("another", os.stat(d / "c").st_ino != first, True)


def test_row_011_rmdir_with_children_says_ebusy(d, observe):
    (d / "c" / "g").mkdir(parents=True)
    observe("child", attempt(os.rmdir, d), "EBUSY")
    observe("grandchild", attempt(os.rmdir, d / "c"), "EBUSY")


def test_row_012_rmdir_with_a_live_process_says_ebusy(d, kids, observe):
    (d / "c").mkdir()
    (d / "c" / "cgroup.procs").write_text(str(kids().pid))
    observe("rmdir", attempt(os.rmdir, d / "c"), "EBUSY")


def test_row_012_rmdir_with_only_a_zombie_succeeds(d, kids, observe):
    (d / "c").mkdir()
    kid = kids()
    (d / "c" / "cgroup.procs").write_text(str(kid.pid))
    kid.kill()
    observe("state", kid.state, "Z")
    observe("rmdir", attempt(os.rmdir, d / "c"), "ok")


def test_row_013_rmdir_of_what_is_no_child(d, world, observe):
    (d / "c").mkdir()
    observe("missing", attempt(os.rmdir, d / "none"), "ENOENT")
    observe("control file", attempt(os.rmdir, d / "cgroup.procs"), "ENOTDIR")
    observe("dot", attempt(os.rmdir, f"{d}/c/."), "EINVAL")
    observe("dot dot", attempt(os.rmdir, f"{d}/c/.."), "ENOTEMPTY")
    observe("root", attempt(os.rmdir, world.root), "EBUSY")


def test_row_014_rmdir_minds_neither_open_files_nor_a_cwd(d, kids, observe):
    (d / "c").mkdir()
    (d / "w").mkdir()
    with opened(d / "c" / "cgroup.procs"), opened(d / "c"):
        observe("open", attempt(os.rmdir, d / "c"), "ok")
    kids().do(os.chdir, str(d / "w"))
    observe("cwd", attempt(os.rmdir, d / "w"), "ok")


def test_row_015_rename_of_a_cgroup_says_eperm(d, observe):
    for name in "cde":
        (d / name).mkdir()
    observe("new name", attempt(os.rename, d / "c", d / "n"), "EPERM")
    observe("over another", attempt(os.rename, d / "c", d / "e"), "EPERM")
    observe("into another", attempt(os.rename, d / "c", d / "e" / "c"), "EPERM")


def test_row_016_rename_special_cases_of_the_path_walk(d, observe):
    (d / "c").mkdir()
    file = d / "c" / "cgroup.procs"
    observe("onto itself", attempt(os.rename, d / "c", d / "c"), "ok")
    observe("into itself", attempt(os.rename, d / "c", d / "c" / "x"), "EINVAL")
    observe("file over directory", attempt(os.rename, d / "cgroup.procs", d / "c"), "EISDIR")
    observe("directory over file", attempt(os.rename, d / "c", d / "cgroup.procs"), "ENOTDIR")
    observe("file onto itself", attempt(os.rename, file, file), "ok")


def test_row_017_rename_of_a_file_says_eperm(d, observe):
    observe("new name", attempt(os.rename, d / "cgroup.procs", d / "n"), "EPERM")
    observe("over another", attempt(os.rename, d / "cgroup.procs", d / "cgroup.type"), "EPERM")


def test_row_018_rename_elsewhere_or_of_nothing(d, tmp_path, observe):
    (d / "c").mkdir()
    observe(
        "directory to another file system", attempt(os.rename, d / "c", tmp_path / "c"), "EXDEV"
    )
    other = tmp_path / "procs"
    observe("file to another file system", attempt(os.rename, d / "cgroup.procs", other), "EXDEV")
    observe("missing", attempt(os.rename, d / "none", d / "n"), "ENOENT")


@pytest.mark.parametrize("flag", ["NOREPLACE", "EXCHANGE", "WHITEOUT"])
def test_row_019_rename_with_a_flag_says_einval(d, observe, flag):
    (d / "c").mkdir()
    (d / "e").mkdir()
    flags = getattr(syscalls, f"RENAME_{flag}")
    target = d / ("e" if flag == "EXCHANGE" else "n")
    observe("rename", attempt(syscalls.renameat2, d / "c", target, flags), "EINVAL")


def test_row_020_creating_a_file_says_eacces(d, observe):
    creating = os.O_WRONLY | os.O_CREAT
    observe("new", attempt(open_and_close, d / "new", creating), "EACCES")
    exclusive = creating | os.O_EXCL
    observe("exclusive", attempt(open_and_close, d / "cgroup.procs", exclusive), "EEXIST")
    observe("existing", attempt(open_and_close, d / "cgroup.procs", creating), "ok")


def test_row_021_no_other_kind_of_node_can_be_made(d, observe):
    temporary = os.O_WRONLY | os.O_TMPFILE
    observe("tmpfile", attempt(open_and_close, d, temporary), "EOPNOTSUPP")
    observe("regular", attempt(os.mknod, d / "n", stat.S_IFREG | 0o600), "EACCES")
    observe("fifo", attempt(os.mkfifo, d / "n"), "EPERM")
    device = os.makedev(1, 3)
    observe("device", attempt(os.mknod, d / "n", stat.S_IFCHR | 0o600, device), "EPERM")
    observe("socket", attempt(os.mknod, d / "n", stat.S_IFSOCK | 0o600), "EPERM")


def test_row_022_links_say_eperm(d, observe):
    observe("symlink", attempt(os.symlink, "x", d / "n"), "EPERM")
    observe("symlink existing", attempt(os.symlink, "x", d / "cgroup.procs"), "EEXIST")
    observe("link", attempt(os.link, d / "cgroup.procs", d / "n"), "EPERM")
    observe("link existing", attempt(os.link, d / "cgroup.procs", d / "cgroup.type"), "EEXIST")


def test_row_023_unlink_never_removes(d, observe):
    (d / "c").mkdir()
    observe("control file", attempt(os.unlink, d / "cgroup.procs"), "EPERM")
    observe("directory", attempt(os.unlink, d / "c"), "EISDIR")
    observe("missing", attempt(os.unlink, d / "none"), "ENOENT")
    observe("still there", (d / "cgroup.procs").exists(), True)


def test_row_024_directories_and_files_are_not_confused(d, observe):
    observe("directory for writing", attempt(open_and_close, d, os.O_WRONLY), "EISDIR")
    with opened(d) as fd:
        observe("read of a directory", attempt(os.read, fd, 10), "EISDIR")
    as_directory = os.O_RDONLY | os.O_DIRECTORY
    observe(
        "file as directory", attempt(open_and_close, d / "cgroup.procs", as_directory), "ENOTDIR"
    )
    slash = f"{d}/cgroup.procs/"
    observe("file and slash", attempt(open_and_close, slash, os.O_RDONLY), "ENOTDIR")


def test_c4_mkdir_works_in_populated_and_frozen_cgroups(d, kids, observe):
    (d / "c").mkdir()
    (d / "c" / "cgroup.procs").write_text(str(kids().pid))
    observe("populated", attempt(os.mkdir, d / "c" / "g"), "ok")
    (d / "f").mkdir()
    (d / "f" / "cgroup.freeze").write_text("1")
    observe("frozen", attempt(os.mkdir, d / "f" / "g"), "ok")


def test_c4_mkdir_needs_write_permission_on_the_parent(d, kids, observe):
    kid = kids()
    kid.do(become, NOBODY)
    observe("root's", attempt(kid.do, os.mkdir, str(d / "n")), "EACCES")
    os.chmod(d, 0o777)
    observe("writable", attempt(kid.do, os.mkdir, str(d / "n")), "ok")


def test_c4_readdir_is_stable_and_knows_the_kinds(d, observe):
    for name in ("x", "y"):
        (d / name).mkdir()
    first, second = ([entry.name for entry in os.scandir(d)] for _ in range(2))
    observe("stable", first == second, True)
    directories = sorted(entry.name for entry in os.scandir(d) if entry.is_dir())
    observe("directories", directories, ["x", "y"])


def test_c4_listing_follows_mkdir_and_rmdir(d, observe):
    os.listdir(d)
    (d / "x").mkdir()
    observe("after mkdir", "x" in os.listdir(d), True)
    observe("before rmdir", (d / "x").exists(), True)
    (d / "x").rmdir()
    observe("after rmdir", "x" in os.listdir(d), False)
    observe("lookup after rmdir", attempt(os.stat, d / "x"), "ENOENT")
