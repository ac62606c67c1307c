"""The selftests as programs: Debian's kernel source, fetched, unpacked and built once.

Everything lives in one directory per version of the package below the user's cache directory. The
source itself is removed once the tests are built.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "linux-source-6.12"
BUILT = "programs"
# Of the kernel's tree: the tests themselves, and what its user headers are made of.
PARTS = (
    "Makefile", "scripts", "include", "arch/x86", "usr",
    "tools/include", "tools/arch", "tools/lib", "tools/build", "tools/scripts",
    "tools/testing/selftests/kvm", "tools/testing/selftests/rseq",
    "tools/testing/selftests/lib.mk", "tools/testing/selftests/*.h",
)  # fmt: skip
PROGRAMS = {"apt-get": "apt", "dpkg-deb": "dpkg", "gcc": "gcc", "make": "make", "xz": "xz-utils"}


class UnavailableError(Exception):
    """The tests cannot be built or run here; the text says why."""


def cache_directory() -> Path:
    """Returns where built tests are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "kvmsim" / "selftests"


def built(cache: Path) -> Path | None:
    """Returns the directory with the newest tests that were built already."""
    ready = sorted(cache.glob(f"*/{BUILT}"), key=lambda path: path.stat().st_mtime)
    return ready[-1] if ready else None


def found(directory: Path) -> dict[str, Path]:
    """Returns every test by its name."""
    return {path.name: path for path in directory.iterdir()}


def programs(cache: Path) -> Path:
    """Returns the directory with the tests, after building them if that was never done.

    Raises:
        UnavailableError: They cannot be built here.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        ready = built(cache)
        return ready if ready is not None else _build(cache)


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Two callers at once would build twice."""
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(cache: Path) -> Path:
    _need_programs()
    work = cache / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        package = _fetch(work)
        version = package.name.split("_")[1]
        tree = _unpack(package, work)
        _say("building the tests")
        _make(tree, "headers")
        output = work / "output"
        output.mkdir()
        # Some tests may not build with this compiler; those that did are what there is.
        headers = f"KHDR_INCLUDES=-isystem {tree}/usr/include"
        _make(tree / "tools/testing/selftests/kvm", "-k", f"OUTPUT={output}", headers, strict=False)
        ready = _collect(output, work / BUILT)
        (cache / version).mkdir(exist_ok=True)
        return ready.rename(cache / version / BUILT)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _need_programs() -> None:
    missing = [name for program, name in PROGRAMS.items() if shutil.which(program) is None]
    if "apt" in missing or "dpkg" in missing:
        raise UnavailableError(f"needs apt, which has Debian's {PACKAGE}")
    if not missing:
        return
    if os.geteuid() != 0:
        raise UnavailableError(f"run as root once: apt-get install {' '.join(missing)}")
    _say(f"installing {' '.join(missing)}")
    _command("apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing)


def _fetch(work: Path) -> Path:
    """Downloads the package; a list of packages that is empty or out of date fails the first."""
    _say(f"fetching {PACKAGE}")
    sandbox = ("-o", "APT::Sandbox::User=root") if os.geteuid() == 0 else ()
    download = ("apt-get", *sandbox, "download", PACKAGE)
    try:
        _command(*download, cwd=work)
    except UnavailableError:
        if os.geteuid() != 0:
            raise
        _command("apt-get", "-qq", "update")
        _command(*download, cwd=work)
    return next(work.glob(f"{PACKAGE}_*.deb"))


def _unpack(package: Path, work: Path) -> Path:
    """Takes the parts that are needed out of the archive in the package."""
    _say("unpacking")
    archive = f"./usr/src/{PACKAGE}.tar.xz"
    tree = work / "tree"
    tree.mkdir()
    members = " ".join(f"'{PACKAGE}/{part}'" for part in PARTS)
    script = (
        f"set -o pipefail; dpkg-deb --fsys-tarfile '{package}' | tar -xO '{archive}' | "
        f"tar -xJ -C '{tree}' --strip-components=1 --wildcards {members}"
    )
    _command("bash", "-c", script)
    package.unlink()
    return tree


def _make(directory: Path, *arguments: str, strict: bool = True) -> None:
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    command = ["make", "-s", jobs, "ARCH=x86_64", "-C", str(directory), *arguments]
    _command(*command, strict=strict)


def _collect(output: Path, target: Path) -> Path:
    """Moves the tests, which lie beside their objects, into one directory."""
    target.mkdir()
    for directory in (output, output / "x86_64"):
        for path in directory.iterdir():
            if path.is_file() and os.access(path, os.X_OK):
                path.rename(target / path.name)
    if not any(target.iterdir()):
        raise UnavailableError("none of the tests could be built")
    return target


def _command(*command: str, cwd: Path | None = None, strict: bool = True) -> None:
    """Runs a command at low priority.

    Raises:
        UnavailableError: It failed; with its last words.
    """
    try:
        done = subprocess.run(
            ["nice", *command],
            cwd=cwd,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise UnavailableError(f"{command[0]}: {error.strerror}") from error
    if strict and done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "failed").splitlines()
        raise UnavailableError(f"{command[0]}: {words[-1]}")


def _say(text: str) -> None:
    print(f"run_selftests: {text}", file=sys.stderr, flush=True)
