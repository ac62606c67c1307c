from __future__ import annotations

import logging
import os
import select
import stat
from types import SimpleNamespace

import pytest
import trio

ALWAYS = select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM
EVENT = select.POLLPRI | select.POLLERR
REG = stat.S_IFREG | 0o644


async def test_an_unchanged_limit_is_opened_cached(operations, client, root_ctx):
    ino = await client.walk("cgroup.max.depth")
    info = await operations.open(ino, os.O_RDONLY, root_ctx)
    assert (bool(info.direct_io), bool(info.keep_cache)) == (False, True)


async def test_a_live_file_is_opened_direct(operations, client, root_ctx):
    ino = await client.walk("cgroup.stat")
    assert (await operations.open(ino, os.O_RDONLY, root_ctx)).direct_io


async def test_a_file_without_text_is_opened_direct(operations, client, root_ctx):
    await client.mkdir(b"a")
    ino = await client.walk("a/cgroup.kill")
    assert (await operations.open(ino, os.O_RDONLY, root_ctx)).direct_io


async def test_a_limit_is_direct_after_a_write_until_it_has_been_quiet(
    operations, client, clock, root_ctx
):
    await client.write("cgroup.max.depth", b"7")
    ino = await client.walk("cgroup.max.depth")
    early = bool((await operations.open(ino, os.O_RDONLY, root_ctx)).direct_io)
    clock.now += 100
    late = bool((await operations.open(ino, os.O_RDONLY, root_ctx)).direct_io)
    assert (early, late) == (True, False)


async def test_a_writer_is_answered_when_the_last_cached_reader_has_closed(operations, client):
    reader = await client.open("cgroup.max.depth")
    order = []

    async def write():
        await client.write("cgroup.max.depth", b"7")
        order.append("written")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.sleep(0.005)
        order.append("closed")
        await operations.release(reader)
    assert order == ["closed", "written"]


async def test_a_writer_is_answered_when_the_grace_is_over(operations, client):
    await client.open("cgroup.max.depth")
    with trio.fail_after(5):
        await client.write("cgroup.max.depth", b"7")
    assert operations.gate.is_held(await client.walk("cgroup.max.depth"))


async def test_a_text_somebody_still_reads_is_dropped_before_the_write_is_answered(client, kernel):
    await client.open("cgroup.max.depth")
    await client.write("cgroup.max.depth", b"7")
    assert kernel.inodes == [await client.walk("cgroup.max.depth")]


async def test_enabling_a_controller_drops_what_the_kernel_knows_of_the_children(client, kernel):
    child = await client.mkdir(b"a")
    listing = await client.walk("a/cgroup.controllers")
    with pytest.raises(FileNotFoundError):
        await client.walk("a/misc.max")
    await client.write("cgroup.subtree_control", b"+misc")
    assert (kernel.inodes, kernel.entries) == ([listing], [(child, b"misc.max")])


async def test_enabling_a_controller_costs_nothing_where_the_kernel_knows_nothing(client, kernel):
    await client.mkdir(b"a")
    await client.write("cgroup.subtree_control", b"+misc")
    assert (kernel.inodes, kernel.entries) == ([], [])


async def test_disabling_a_controller_drops_the_names_of_its_files(client, kernel):
    await client.write("cgroup.subtree_control", b"+misc")
    child = await client.mkdir(b"a")
    await client.walk("a/misc.max")
    await client.write("cgroup.subtree_control", b"-misc")
    assert kernel.entries == [(child, b"misc.max")]


async def test_a_change_from_inside_waits_for_cached_readers(operations, client, roots):
    reader = await client.open("misc.capacity")
    misc = roots.controller("misc")
    done = []

    async def change():
        await operations.change(["misc.capacity"], lambda: misc.set_capacity("sev", 9))
        done.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await trio.sleep(0.005)
        before = list(done)
        await operations.release(reader)
    assert (before, await client.read("misc.capacity")) == ([], b"sev 9\n")


async def test_a_removed_cgroup_drops_the_texts_of_its_open_files(operations, client, kernel):
    await client.mkdir(b"a")
    ino = await client.walk("a/cgroup.max.depth")
    await client.walk("a/cgroup.stat")
    await client.open("a/cgroup.max.depth")
    await operations.rmdir(1, b"a", SimpleNamespace(uid=0, gid=0, pid=1))
    assert kernel.inodes == [ino]


async def test_a_read_goes_on_in_the_text_it_began(operations, client):
    await client.write("cgroup.max.depth", b"12345")
    fh = await client.open("cgroup.max.depth")
    first = await operations.read(fh, 0, 2)
    await client.write("cgroup.max.depth", b"678")
    rest = await operations.read(fh, 2, 100)
    end = await operations.read(fh, 6, 100)
    again = await operations.read(fh, 0, 100)
    assert (first, rest, end, again) == (b"12", b"345\n", b"", b"678\n")


async def test_a_read_elsewhere_generates_the_text_again(operations, client):
    await client.write("cgroup.max.depth", b"123")
    fh = await client.open("cgroup.max.depth")
    await operations.read(fh, 0, 2)
    await client.write("cgroup.max.depth", b"9")
    assert await operations.read(fh, 1, 100) == b"\n"


async def test_the_rest_of_a_text_is_delivered_after_the_removal(
    operations, client, refuses, root_ctx
):
    await client.mkdir(b"a")
    fh = await client.open("a/cgroup.stat")
    first = await operations.read(fh, 0, 5)
    await operations.rmdir(1, b"a", root_ctx)
    rest = await operations.read(fh, 5, 4096)
    end = await refuses(operations.read(fh, 5 + len(rest), 4096))
    assert ((first + rest)[:15], end) == (b"nr_descendants ", "ENODEV")


async def test_open_of_a_removed_file_is_asked_twice(operations, client, refuses, root_ctx):
    await client.mkdir(b"a")
    ino = await client.walk("a/cgroup.procs")
    await operations.rmdir(1, b"a", root_ctx)
    answers = [await refuses(operations.open(ino, os.O_RDONLY, root_ctx)) for _ in range(3)]
    assert answers == ["ESTALE", "ENODEV", "ESTALE"]


async def test_poll_of_an_events_file_follows_reading_and_events(operations, client, roots):
    await client.write("cgroup.subtree_control", b"+misc")
    await client.mkdir(b"a")
    await client.write("a/misc.max", b"sev 0")
    ino = await client.walk("a/misc.events")
    fh = await client.open("a/misc.events")
    seen = [await operations.poll(ino, fh, None, None)]
    await operations.read(fh, 0, 100)
    seen.append(await operations.poll(ino, fh, None, None))
    with pytest.raises(Exception, match=r"misc\.max"):
        roots.v2.find("/a").css["misc"].try_charge("sev")
    seen.append(await operations.poll(ino, fh, None, None))
    assert seen == [ALWAYS | EVENT, ALWAYS, ALWAYS | EVENT]


async def test_an_event_wakes_every_poller_once(operations, client, roots):
    await client.write("cgroup.subtree_control", b"+misc")
    await client.mkdir(b"a")
    await client.write("a/misc.max", b"sev 0")
    ino, woken = await client.walk("a/misc.events"), []
    for name in ("one", "two"):
        fh = await client.open("a/misc.events")
        waker = SimpleNamespace(notify=lambda name=name: woken.append(name))
        await operations.poll(ino, fh, waker, None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operations.notifier.run)
        with pytest.raises(Exception, match=r"misc\.max"):
            roots.v2.find("/a").css["misc"].try_charge("sev")
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    assert sorted(woken) == ["one", "two"]


async def test_o_direct_is_refused(operations, client, refuses, root_ctx):
    ino = await client.walk("cgroup.procs")
    assert await refuses(operations.open(ino, os.O_DIRECT, root_ctx)) == "EINVAL"


async def test_what_cgroupfs_does_not_have_is_refused(operations, refuses, root_ctx):
    assert [
        await refuses(operations.create(1, b"x", 0o644, 0, root_ctx)),
        await refuses(operations.mknod(1, b"x", REG, 0, root_ctx)),
        await refuses(operations.mknod(1, b"x", stat.S_IFIFO | 0o644, 0, root_ctx)),
        await refuses(operations.symlink(1, b"x", b"y", root_ctx)),
        await refuses(operations.link(2, 1, b"x", root_ctx)),
        await refuses(operations.unlink(1, b"cgroup.procs", root_ctx)),
        await refuses(operations.rename(1, b"a", 1, b"b", 1, root_ctx)),
        await refuses(operations.rename(1, b"a", 1, b"b", 0, root_ctx)),
        await refuses(operations.fsyncdir(1, False)),
        await refuses(operations.flush(1)),
    ] == [
        "EACCES",
        "EACCES",
        "EPERM",
        "EPERM",
        "EPERM",
        "EPERM",
        "EINVAL",
        "EPERM",
        "EINVAL",
        "ENOSYS",
    ]


async def test_a_bug_is_logged_and_answered_with_eio(
    operations, client, refuses, monkeypatch, caplog
):
    fh = await client.open("cgroup.stat")
    monkeypatch.setattr(operations._tree, "read", lambda *_: 1 // 0)
    with caplog.at_level(logging.ERROR):
        answer = await refuses(operations.read(fh, 0, 100))
    assert (answer, "ZeroDivisionError" in caplog.text) == ("EIO", True)


async def test_a_missing_name_is_remembered_by_the_kernel(operations, root_ctx):
    entry = await operations.lookup(1, b"nothing", root_ctx)
    assert (entry.st_ino, entry.entry_timeout > 1e6) == (0, True)


async def test_sizes_of_limits_are_exact_and_of_live_files_nought(operations, client, root_ctx):
    await client.write("cgroup.max.depth", b"12345")
    sizes = [
        (await operations.getattr(await client.walk(name), root_ctx)).st_size
        for name in ("cgroup.max.depth", "cgroup.stat")
    ]
    assert sizes == [6, 0]


async def test_attributes_follow_what_changed_them(operations, client, root_ctx):
    before = (await operations.getattr(1, root_ctx)).st_nlink
    await client.mkdir(b"a")
    middle = (await operations.getattr(1, root_ctx)).st_nlink
    await operations.rmdir(1, b"a", root_ctx)
    after = (await operations.getattr(1, root_ctx)).st_nlink
    assert (before, middle, after) == (2, 3, 2)


async def test_a_users_mount_shows_the_user_as_owner_and_takes_it_for_root(
    make_operations, user_owner
):
    operations = make_operations(owner=user_owner)
    user = SimpleNamespace(uid=1000, gid=1001, pid=1)
    entry = await operations.lookup(1, b"cgroup.procs", user)
    made = await operations.mkdir(1, b"a", 0o755, user)
    owner = operations._tree.getattr(made.st_ino)
    assert (entry.st_uid, entry.st_gid) == (1000, 1001)
    assert (owner.uid, owner.gid) == (0, 0)


async def test_statfs_is_that_of_cgroupfs(operations, root_ctx):
    found = await operations.statfs(root_ctx)
    assert (found.f_bsize, found.f_namemax, found.f_blocks, found.f_files) == (4096, 255, 0, 0)


async def test_a_live_text_is_read_after_what_is_on_its_way(operations, client):
    fh = await client.open("cgroup.stat")
    arrived = trio.Event()
    order = []
    operations._tree.settle = lambda row: arrived.wait() if row.name == "cgroup.stat" else None

    async def read():
        await operations.read(fh, 0, 4096)
        order.append("read")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(0.005)
        order.append("arrived")
        arrived.set()
    assert order == ["arrived", "read"]


async def test_a_set_text_is_read_at_once(operations, client):
    fh = await client.open("cgroup.max.depth")
    operations._tree.settle = None
    assert await operations.read(fh, 0, 4096) == b"max\n"
