from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from cgfs.errors import MountError
from cgfs.fuse import fusermount

NOBODY = 65534
MNT_DETACH = 2


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def umount(directory):
    """Takes away what a test that failed may have left."""
    ctypes.CDLL(None).umount2(os.fsencode(directory), MNT_DETACH)


def is_mounted(directory):
    return str(directory) in Path("/proc/self/mountinfo").read_text()


def test_sigterm_unmounts_and_ends_cleanly(mounted_cgfs, root):
    errors = mounted_cgfs.stop()
    assert (errors, mounted_cgfs.process.returncode, is_mounted(root)) == ("", 0, False)


def test_sigterm_while_a_directory_and_a_file_are_in_use_unmounts(mounted_cgfs, root):
    with open(root / "cgroup.procs", "rb") as held:
        directory = os.open(root, os.O_RDONLY)
        errors = mounted_cgfs.stop()
        with pytest.raises(OSError, match=r"not connected|abort"):
            os.pread(held.fileno(), 10, 0)
        os.close(directory)
    assert (errors, is_mounted(root)) == ("", False)


def test_sigterm_under_load_unmounts(mounted_cgfs, root):
    gone = []

    def load():
        try:
            while True:
                (root / "cgroup.max.depth").read_text()
                with open(root / "cgroup.max.depth", "r+b", buffering=0) as file:
                    file.write(b"7")
        except OSError as error:
            gone.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    errors = mounted_cgfs.stop()
    for thread in threads:
        thread.join()
    assert (len(gone), is_mounted(root)) == (4, False)
    assert "Traceback" not in errors


def test_unmounted_by_somebody_else_ends_the_server(mounted_cgfs, root):
    subprocess.run(["umount", root], check=True, timeout=20)
    assert (mounted_cgfs.ended(), mounted_cgfs.process.returncode) == ("", 0)


@pytest.mark.skipif(shutil.which("fusermount3") is None, reason="fusermount3 is not installed")
def test_sigkill_leaves_no_dead_mount(mounted_cgfs, root):
    mounted_cgfs.process.kill()
    mounted_cgfs.ended()
    assert wait_until(lambda: not is_mounted(root))


def test_a_directory_that_is_mounted_already_is_refused(mounted_cgfs, root):
    with pytest.raises(MountError, match=r"already a mount point \(fuse.cgfs\)"):
        fusermount.check(str(root))


def test_a_stopped_server_does_not_stop_the_check(mounted_cgfs, root):
    del mounted_cgfs
    with pytest.raises(MountError, match="no such directory"):
        fusermount.check(str(root.parent / "missing"))


def test_a_file_is_no_mount_point(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MountError, match="is not a directory"):
        fusermount.check(str(tmp_path / "file"))


def test_two_mounts_in_one_process_are_refused(start_cgfs, tmp_path):
    server = start_cgfs()
    server.hear()
    script = (
        "import sys, trio\n"
        "from cgfs.core.roots import Roots\n"
        "from cgfs.errors import MountError\n"
        "from cgfs.fuse.mount import mounted\n"
        "from cgfs.views.tree import Tree\n"
        "def tree():\n"
        "    roots = Roots([])\n"
        "    return Tree(roots, roots.v2.root)\n"
        "async def main(first, second):\n"
        "    async with mounted(tree(), first):\n"
        "        try:\n"
        "            async with mounted(tree(), second):\n"
        "                pass\n"
        "        except MountError as error:\n"
        "            print(error)\n"
        "trio.run(main, *sys.argv[1:])\n"
    )
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "first", tmp_path / "second"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.fspath(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == f"{tmp_path / 'second'}: this process serves a mount already\n"


@pytest.fixture
def user_directory():
    if os.geteuid() != 0:
        pytest.skip("not root, so not able to become another user")
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")
    # Not below tmp_path, which pytest keeps for its own user.
    above = Path(tempfile.mkdtemp(prefix="cgfs-user-"))
    above.chmod(0o755)
    directory = above / "mount"
    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    # As udev makes it; a machine without udev has it for root only.
    mode = os.stat("/dev/fuse").st_mode & 0o777
    os.chmod("/dev/fuse", 0o666)
    yield directory
    os.chmod("/dev/fuse", mode)
    umount(directory)
    shutil.rmtree(above)


def as_nobody(script, *arguments):
    return subprocess.run(
        ["sh", "-ec", script, "sh", *arguments],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_an_ordinary_user_is_root_in_a_mount_of_its_own(start_cgfs, user_directory):
    server = start_cgfs("nobody", root=user_directory)
    assert server.hear() == {"ready": True}
    done = as_nobody(
        'cd "$1"; echo +misc > cgroup.subtree_control; mkdir a; echo "sev 2" > a/misc.max;'
        "cat a/misc.max; stat -c %u:%g . a a/misc.max; rmdir a",
        user_directory,
    )
    assert (done.stdout, done.stderr) == ("sev 2\n65534:65534\n65534:65534\n65534:65534\n", "")


@pytest.mark.skipif(fusermount.user_allow_other(), reason="user_allow_other is set")
def test_others_have_no_access_to_a_users_mount(start_cgfs, user_directory):
    server = start_cgfs("nobody", root=user_directory)
    assert server.hear() == {"ready": True}
    with pytest.raises(PermissionError):
        os.listdir(user_directory)


def test_sigkill_of_a_users_server_leaves_no_dead_mount(start_cgfs, user_directory):
    server = start_cgfs("nobody", root=user_directory)
    server.hear()
    server.process.send_signal(signal.SIGKILL)
    server.ended()
    assert wait_until(lambda: not is_mounted(user_directory))


def test_a_directory_of_somebody_else_is_refused_in_one_line(start_cgfs, user_directory):
    os.chown(user_directory, 0, 0)
    server = start_cgfs("nobody", root=user_directory)
    answer = server.hear()
    server.ended()
    assert answer["error"].startswith(f"cannot mount on {user_directory}: ")
    assert "\n" not in answer["error"]
