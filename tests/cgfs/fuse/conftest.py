"""The handlers on a real tree, called as pyfuse3 calls them, without a mount."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pyfuse3
import pytest

from cgfs.fuse import notify
from cgfs.fuse.attributes import Owner
from cgfs.fuse.driver import Driver
from cgfs.fuse.gate import Gate
from cgfs.fuse.operations import Operations
from cgfs.views.tree import Tree

ROOT = SimpleNamespace(uid=0, gid=0, pid=100)


class Clock:
    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


class Kernel:
    """What the kernel was told; stands in for the calls of pyfuse3."""

    def __init__(self):
        self.attributes: list[int] = []
        self.inodes: list[int] = []
        self.entries: list[tuple[int, bytes]] = []

    def invalidate_inode(self, ino, attr_only=False):
        (self.attributes if attr_only else self.inodes).append(ino)

    def invalidate_entry(self, parent, name, deleted=0):
        self.entries.append((parent, name))


class Client:
    """System calls as requests."""

    def __init__(self, operations):
        self.operations = operations

    async def walk(self, path):
        ino = 1
        for name in path.strip("/").split("/"):
            ino = (await self.operations.lookup(ino, name.encode(), ROOT)).st_ino
            if not ino:
                raise FileNotFoundError(path)
        return ino

    async def open(self, path, flags=0, ctx=ROOT):
        info = await self.operations.open(await self.walk(path), flags, ctx)
        return info.fh

    async def read(self, path):
        fh = await self.open(path)
        text = await self.operations.read(fh, 0, 4096)
        await self.operations.release(fh)
        return text

    async def write(self, path, text):
        fh = await self.open(path, 1)
        try:
            return await self.operations.write(fh, 0, text)
        finally:
            await self.operations.release(fh)

    async def mkdir(self, name, parent=1):
        return (await self.operations.mkdir(parent, name, 0o755, ROOT)).st_ino


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    for name in ("invalidate_inode", "invalidate_entry"):
        monkeypatch.setattr(notify.pyfuse3, name, getattr(kernel, name))
    return kernel


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_operations(roots, kernel, clock):
    del kernel

    def make(**options):
        tree = Tree(roots, roots.v2.root)
        gate = Gate(clock, quiet_ns=100, grace_ns=50_000_000)
        return Operations(tree, Driver(), gate=gate, now_ns=lambda: 1, **options)

    return make


@pytest.fixture
async def operations(make_operations):
    operations = make_operations()
    operations.notifier.start(b"/nowhere")
    yield operations
    assert await operations.notifier.stop()


@pytest.fixture
def client(operations):
    return Client(operations)


@pytest.fixture
def refuses():
    """The errno a handler answers with."""

    async def check(request):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await request
        return errno.errorcode[caught.value.errno]

    return check


@pytest.fixture
def root_ctx():
    return ROOT


@pytest.fixture
def user_owner():
    return Owner(1000, 1001)
