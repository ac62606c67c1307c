import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.regs import KVM_TRANSLATION
from kvmsim.errors import KvmError
from kvmsim.kvm import sregs

PRESENT, LARGE = 1, 1 << 7
PG_PE, PAE, PSE, LA57, LMA = 1 << 31 | 1, 1 << 5, 1 << 4, 1 << 12, 1 << 10
INVALID = (1 << 64) - 1


class Memory:
    """Guest memory as a dictionary of entries."""

    def __init__(self, entries):
        self.entries = entries

    def read(self, gpa, size_bytes):
        if gpa not in self.entries:
            raise KvmError(14, "no memory")
        return self.entries[gpa].to_bytes(size_bytes, "little")


@pytest.fixture
def translate(kvm):
    """Translate one address of a guest with these control registers and page tables."""

    def translate_one(address, entries, *, toml='vendor = "amd"\n', encrypted=False, **registers):
        vm = kvm(toml).create_vm(2 if encrypted else 0, 1)
        if encrypted:
            vm.encrypt()
        vcpu = vm.create_vcpu(0)
        vm.memory = Memory(entries)
        for name, value in {"cr0": PG_PE, "cr3": 0x1000, **registers}.items():
            sregs.of(vcpu).put(name, value)
        data = KVM_TRANSLATION.pack(linear_address=address)
        assert vcpu.ioctl(ioctls.KVM_TRANSLATE, data) == 0
        assert KVM_TRANSLATION.get(data, "writeable") == 1
        gpa = KVM_TRANSLATION.get(data, "physical_address")
        assert (gpa != INVALID) == bool(KVM_TRANSLATION.get(data, "valid"))
        return None if gpa == INVALID else gpa

    return translate_one


def four_levels(address, leaf):
    """Tables at 0x1000 to 0x4000 for one address."""
    indices = [address >> shift & 0x1FF for shift in (39, 30, 21, 12)]
    tables = (0x1000, 0x2000, 0x3000, 0x4000)
    entries = {
        table + 8 * index: following | PRESENT
        for table, index, following in zip(tables[:3], indices, tables[1:], strict=False)
    }
    return entries | {tables[3] + 8 * indices[3]: leaf}


LONG = {"cr4": PAE, "efer": LMA | 1 << 8}


@pytest.mark.parametrize("address", [0x7FFF12345678, 0xFFFF800000001678, 0x678])
def test_four_levels(translate, address):
    tables = four_levels(address, 0xABCDE000 | PRESENT)
    assert translate(address, tables, **LONG) == 0xABCDE000 | address & 0xFFF


def test_bits_above_the_address_are_no_part_of_it(translate):
    tables = four_levels(0x5000, 1 << 63 | 0x123 << 52 | 0xABCDE000 | PRESENT)
    assert translate(0x5123, tables, **LONG) == 0xABCDE123


def test_page_of_2_mib(translate):
    tables = {0x1000: 0x2001, 0x2000: 0x3001, 0x3008: 0x40000000 | LARGE | PRESENT}
    assert translate(0x212345, tables, **LONG) == 0x40012345


def test_page_of_1_gib(translate):
    tables = {0x1000: 0x2001, 0x2008: 0x80000000 | LARGE | PRESENT}
    assert translate(0x40012345, tables, **LONG) == 0x80012345


@pytest.mark.parametrize("missing", [0x1000, 0x2000, 0x3000, 0x4000])
def test_entry_that_is_not_present(translate, missing):
    tables = four_levels(0, 0xABCDE000 | PRESENT)
    tables[missing] &= ~PRESENT
    assert translate(0, tables, **LONG) is None


def test_table_behind_no_memory(translate):
    assert translate(0, {0x1000: 0x2001}, **LONG) is None


@pytest.mark.parametrize("address", [1 << 47, 1 << 63, 0xFFFF000000000000])
def test_address_that_is_not_canonical(translate, address):
    tables = four_levels(address, 0xABCDE000 | PRESENT)
    assert translate(address, tables, **LONG) is None


def test_five_levels(translate):
    address = 0x00AB123456789ABC
    index = address >> 48 & 0x1FF
    lower = four_levels(address, 0x77777000 | PRESENT)
    tables = {0x9000 + 8 * index: 0x1001} | lower
    got = translate(address, tables, cr3=0x9000, cr4=PAE | LA57, efer=LMA)
    assert got == 0x77777ABC


def test_pae(translate):
    tables = {0x1020 + 8 * 3: 0x2001, 0x2000 + 8: 0x3001, 0x3000 + 16: 0x155555000 | PRESENT}
    assert translate(0xC0202ABC, tables, cr3=0x1020, cr4=PAE) == 0x155555ABC


def test_pae_page_of_2_mib(translate):
    tables = {0x1020: 0x2001, 0x2000 + 8: 0x40000000 | LARGE | PRESENT}
    assert translate(0x212345, tables, cr3=0x1020, cr4=PAE) == 0x40012345


def test_32_bit(translate):
    tables = {0x1000 + 4 * 0x300: 0x2001, 0x2000 + 4 * 0x123: 0x55555000 | PRESENT}
    assert translate(0xC0123ABC, tables) == 0x55555ABC


def test_32_bit_page_of_4_mib_above_4_gib(translate):
    tables = {0x1000 + 4 * 0x300: 0x12400000 | 0x3 << 13 | LARGE | PRESENT}
    assert translate(0xC0123ABC, tables, cr4=PSE) == 0x3_12400000 + 0x123ABC


def test_large_bit_means_nothing_without_the_extension(translate):
    tables = {0x1000: 0x2000 | LARGE | PRESENT, 0x2000: 0x55555001}
    assert translate(0x123, tables) == 0x55555123


def test_bit_that_encrypts_is_no_part_of_the_address(translate):
    sev = 'vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 1\n'
    tables = {at: entry | 1 << 51 for at, entry in four_levels(0, 0xABCDE001).items()}
    assert translate(0x10, tables, toml=sev, encrypted=True, cr3=1 << 51 | 0x1000, **LONG) == (
        0xABCDE010
    )
