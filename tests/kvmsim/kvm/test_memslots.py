from errno import EBADF, EEXIST, EFAULT, EINVAL, ENOTTY

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.memory import (
    KVM_CREATE_GUEST_MEMFD,
    KVM_DIRTY_LOG,
    KVM_MEMORY_ATTRIBUTES,
    KVM_USERSPACE_MEMORY_REGION2,
)
from kvmsim.errors import KvmError
from kvmsim.kvm import guest_memfd, memslots
from kvmsim.kvm.client import LocalClient

PAGE = 4096
SNP = 'vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 5\nsnp = true\n'
SNP_VM = 4
PRIVATE = 4


def errno_of(call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    return error.value.errno


@pytest.fixture
def client():
    return LocalClient(7)


@pytest.fixture
def vm(kvm, client):
    return kvm().create_vm(0, client)


@pytest.fixture
def snp(kvm, client):
    return kvm(SNP).create_vm(SNP_VM, client)


def put(vm, slot=0, gpa=0, pages=4, hva=0x10000, **values):
    data = KVM_USERSPACE_MEMORY_REGION2.pack(
        slot=slot, guest_phys_addr=gpa, memory_size=pages * PAGE, userspace_addr=hva, **values
    )
    return vm.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION2, data)


def test_guest_memory_is_the_creators(vm, client):
    memory = bytearray(b"ab" + bytes(4 * PAGE - 2))
    put(vm, gpa=0x100000, hva=client.map(memory))
    assert vm.memory.read(0x100001, 2) == b"b\0"


def test_read_goes_on_in_the_next_slot(vm, client):
    first, second = bytearray(PAGE), bytearray(PAGE)
    first[-1], second[0] = 1, 2
    put(vm, 0, 0, 1, client.map(first))
    put(vm, 1, PAGE, 1, client.map(second))
    assert vm.memory.read(PAGE - 1, 2) == b"\1\2"


def test_read_behind_no_slot_is_a_fault(vm, client):
    put(vm, pages=1, hva=client.map(bytearray(PAGE)))
    assert errno_of(vm.memory.read, PAGE - 1, 2) == EFAULT


def test_read_of_memory_user_space_took_away_is_a_fault(vm):
    put(vm)
    assert errno_of(vm.memory.read, 0, 1) == EFAULT


def test_writes_of_the_guest_are_in_the_log_once(vm, client):
    put(vm, gpa=0x10000, pages=100, flags=1)
    memslots.of(vm).mark_dirty(0x10000 + 70 * PAGE + 5)
    memslots.of(vm).mark_dirty(0x10000 + 2 * PAGE - 1, 2)
    bitmap = bytearray(16)
    log = KVM_DIRTY_LOG.pack(slot=0, dirty_bitmap=client.map(bitmap))
    vm.ioctl(ioctls.KVM_GET_DIRTY_LOG, log)
    assert int.from_bytes(bitmap, "little") == 1 << 70 | 1 << 2 | 1 << 1
    vm.ioctl(ioctls.KVM_GET_DIRTY_LOG, log)
    assert bitmap == bytes(16)


def test_log_is_kept_when_the_slot_moves_and_lost_when_logging_ends(vm):
    put(vm, gpa=0, flags=1)
    memslots.of(vm).mark_dirty(0)
    put(vm, gpa=0x100000, flags=1)
    assert memslots.of(vm).slots[0].dirty[0] == 1
    put(vm, gpa=0x100000)
    put(vm, gpa=0x100000, flags=1)
    assert memslots.of(vm).slots[0].dirty[0] == 0


def test_writes_behind_no_logged_slot_are_no_news(vm):
    put(vm)
    memslots.of(vm).mark_dirty(0)
    memslots.of(vm).mark_dirty(1 << 30)
    assert memslots.of(vm).slots[0].dirty is None


def test_every_change_is_a_new_generation(vm):
    generations = [memslots.of(vm).generation]
    for change in ({}, {}, {"gpa": 0x100000}, {"gpa": 0x100000, "pages": 0}):
        put(vm, **change)
        generations.append(memslots.of(vm).generation)
    assert generations == [0, 1, 1, 2, 3]


def test_slot_without_memory_at_an_address_is_looked_at_again(vm):
    put(vm, gpa=0x4000, pages=4)
    slots = memslots.of(vm)
    assert not slots.is_torn(0x4000)  # nobody has looked
    slot = slots.slots[0]
    slot.pages = ((PAGE, memoryview(bytearray(PAGE))),)
    generation = slots.generation
    assert [slots.is_torn(gpa) for gpa in (0x3FFF, 0x5000, 0x5FFF, 0x8000)] == [False] * 4
    assert slots.generation == generation
    assert slots.is_torn(0x6000)
    assert slot.pages is None
    assert slots.generation > generation


def test_size_of_the_guest_physical_space_is_the_hosts(kvm, client):
    vm = kvm(SNP).create_vm(0, client)
    assert put(vm, 0, (1 << 47) - 4 * PAGE) == 0
    assert errno_of(put, vm, 1, (1 << 47) - 3 * PAGE) == EEXIST
    assert errno_of(put, vm, 1, 1 << 47) == EINVAL


# -- private memory ------------------------------------------------------------------------------


@pytest.fixture
def memfd(snp, client):
    data = KVM_CREATE_GUEST_MEMFD.pack(size=8 * PAGE)
    return client.open(snp.ioctl(ioctls.KVM_CREATE_GUEST_MEMFD, data))


def test_slot_with_private_pages(snp, memfd):
    put(snp, flags=PRIVATE, guest_memfd=memfd)
    slot = memslots.of(snp).slots[0]
    assert (slot.guest_memfd.size_bytes, slot.guest_memfd_offset) == (8 * PAGE, 0)
    assert slot.guest_memfd.link_name == "[kvm-gmem]"


@pytest.mark.parametrize(
    ("values", "errno"),
    [
        ({"flags": PRIVATE | 1}, EINVAL),
        ({"flags": PRIVATE | 2}, EINVAL),
        ({"guest_memfd_offset": 1}, EINVAL),
        ({"guest_memfd_offset": 5 * PAGE}, EINVAL),
        ({"guest_memfd": 99}, EBADF),
    ],
)
def test_slot_that_cannot_have_private_pages(snp, memfd, values, errno):
    given = {"flags": PRIVATE, "guest_memfd": memfd, **values}
    assert errno_of(lambda: put(snp, **given)) == errno


def test_other_files_hold_no_private_pages(snp, client):
    for file in (None, snp):
        given = {"flags": PRIVATE, "guest_memfd": client.open(file)}
        assert errno_of(lambda given=given: put(snp, **given)) == EINVAL


def test_file_of_another_vm(snp, memfd, client):
    other = snp.system.create_vm(SNP_VM, client)
    assert errno_of(lambda: put(other, flags=PRIVATE, guest_memfd=memfd)) == EINVAL


def test_range_of_a_file_is_behind_one_slot_at_a_time(snp, memfd):
    put(snp, flags=PRIVATE, guest_memfd=memfd)
    second = {"slot": 1, "gpa": 0x100000, "flags": PRIVATE, "guest_memfd": memfd}
    assert errno_of(lambda: put(snp, **second)) == EINVAL
    assert put(snp, **second, guest_memfd_offset=4 * PAGE) == 0
    put(snp, pages=0)
    assert put(snp, 2, 0, flags=PRIVATE, guest_memfd=memfd) == 0


def test_asid_is_held_as_long_as_private_memory_is(snp, memfd, client, accounting):
    snp.encrypt()
    snp.release()
    assert accounting.charged == {"sev_es": 1}
    client.file(memfd).release()
    assert accounting.charged == {"sev_es": 0}


def test_slot_with_private_pages_stays_as_it_is(snp, memfd):
    put(snp, flags=PRIVATE, guest_memfd=memfd)
    moved = {"gpa": 0x100000, "flags": PRIVATE, "guest_memfd": memfd}
    assert errno_of(lambda: put(snp, **moved)) == EINVAL


def attributes(vm, first, count, private, **values):
    data = KVM_MEMORY_ATTRIBUTES.pack(
        address=first * PAGE, size=count * PAGE, attributes=8 if private else 0, **values
    )
    return vm.ioctl(ioctls.KVM_SET_MEMORY_ATTRIBUTES, data)


def test_private_pages_are_those_made_so_last(snp):
    attributes(snp, 10, 10, private=True)
    attributes(snp, 12, 3, private=False)
    attributes(snp, 19, 5, private=True)
    pages = guest_memfd.private_pages(snp)
    assert [page for page in range(30) if page in pages] == [10, 11, *range(15, 24)]


@pytest.mark.parametrize(
    "values", [{"flags": 1}, {"attributes": 16}, {"address": 1}, {"size": 0}, {"size": 4097}]
)
def test_attributes_that_make_no_sense(snp, values):
    data = KVM_MEMORY_ATTRIBUTES.pack(**{"size": PAGE, **values})
    assert errno_of(snp.ioctl, ioctls.KVM_SET_MEMORY_ATTRIBUTES, data) == EINVAL


def test_plain_vm_of_such_a_machine_has_no_private_attribute(kvm, client):
    vm = kvm(SNP).create_vm(0, client)
    assert attributes(vm, 0, 1, private=False) == 0
    assert errno_of(lambda: attributes(vm, 0, 1, private=True)) == EINVAL


def test_machine_without_private_memory_has_no_attributes(vm):
    assert errno_of(lambda: attributes(vm, 0, 1, private=False)) == ENOTTY


@pytest.mark.parametrize(("toml", "kind", "worth"), [(SNP, 4, (1, 8)), (SNP, 0, (0, 0))])
def test_capabilities_of_private_memory_are_those_of_the_type(kvm, toml, kind, worth):
    vm = kvm(toml).create_vm(kind, 1)
    assert tuple(vm.check_extension(number) for number in (234, 233)) == worth
