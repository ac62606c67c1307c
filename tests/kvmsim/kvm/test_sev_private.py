import mmap

import pytest

from kvmsim.abi import sev as abi
from kvmsim.kvm import memslots, sev_private

DBG = abi.KVM_SEV_DBG_STRUCT
PAGE = 4096
PLAIN = bytes(range(256)) * 64  # four pages
SHARED = b"what user space has there".ljust(4 * PAGE, b"\0")


@pytest.fixture
def encrypted(vmm):
    """A guest whose second and third page of four were encrypted; the user space view of all."""
    vmm.at, vmm.cipher = vmm.memory(PLAIN)
    vmm.vm = vmm.started()
    vmm.load(vmm.vm, vmm.at + PAGE, 2 * PAGE)
    vmm.view = memoryview(mmap.mmap(-1, 4 * PAGE))
    vmm.view[:] = SHARED
    return vmm


def sides(vmm, vm=None):
    return list(sev_private.sides(vm or vmm.vm, vmm.at, vmm.view))


def read_by_debugger(vmm, address, length):
    target, seen = vmm.memory(bytes(length))
    command = abi.KVM_SEV_DBG_DECRYPT
    outcome = vmm.run(vmm.vm, command, DBG, src_uaddr=address, dst_uaddr=target, len=length)
    assert outcome.answer == (0, 0)
    return bytes(seen)


def test_guest_sees_plain_bytes_where_memory_was_encrypted_and_only_there(encrypted):
    assert bytes(encrypted.cipher[PAGE : 3 * PAGE]) != PLAIN[PAGE : 3 * PAGE]
    assert [(at, bytes(view)) for at, view in sides(encrypted)] == [
        (0, SHARED[:PAGE]),
        (PAGE, PLAIN[PAGE : 3 * PAGE]),
        (3 * PAGE, SHARED[3 * PAGE :]),
    ]


def test_two_places_of_the_same_memory_are_one_to_the_guest(encrypted):
    (_, once), (_, twice) = sides(encrypted)[1], sides(encrypted)[1]
    once[5] = 99
    assert twice[5] == 99


def test_what_the_guest_changed_is_encrypted_for_the_next_command(encrypted):
    before = bytes(encrypted.cipher)
    (_, plain) = sides(encrypted)[1]
    plain[PAGE : PAGE + 5] = b"guest"
    assert bytes(encrypted.cipher) == before
    assert read_by_debugger(encrypted, encrypted.at + 2 * PAGE, 5) == b"guest"
    assert encrypted.cipher[: 2 * PAGE] == before[: 2 * PAGE]
    assert encrypted.cipher[2 * PAGE : 2 * PAGE + 5] not in (b"guest", before[2 * PAGE :][:5])


def test_guest_sees_what_a_debugger_changed(encrypted):
    sides(encrypted)
    source, _ = encrypted.memory(b"patched")
    target = encrypted.at + PAGE + 7
    encrypted.run(
        encrypted.vm, abi.KVM_SEV_DBG_ENCRYPT, DBG, src_uaddr=source, dst_uaddr=target, len=7
    )
    assert bytes(sides(encrypted)[1][1][7:14]) == b"patched"


def test_further_pages_join_those_beside_them(encrypted):
    generation = memslots.of(encrypted.vm).generation
    encrypted.load(encrypted.vm, encrypted.at + 3 * PAGE, PAGE)
    assert memslots.of(encrypted.vm).generation > generation
    assert [(at, bytes(view)) for at, view in sides(encrypted)] == [
        (0, SHARED[:PAGE]),
        (PAGE, PLAIN[PAGE:]),
    ]


def test_mirror_has_the_pages_of_its_owner(encrypted):
    mirror = encrypted.create()
    assert encrypted.mirror(mirror, encrypted.vm) in (0, None)
    sides(encrypted)[1][1][0] = 77
    assert sides(encrypted, mirror)[1][1][0] == 77


def test_moved_guest_takes_its_pages_along(encrypted):
    other = encrypted.create()
    sides(encrypted)[1][1][0] = 77
    encrypted.move(other, encrypted.vm)
    assert sides(encrypted, other)[1][1][0] == 77
    assert len(sides(encrypted)) == 1


def test_pages_user_space_took_away_are_zero_and_nothing_fails(encrypted):
    del encrypted.client._mapped[encrypted.at]
    (_, plain) = sides(encrypted)[1]
    assert bytes(plain) == bytes(2 * PAGE)
    plain[0] = 1
    sev_private.settle(encrypted.vm)
