from errno import EFAULT, EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.errors import KvmError
from kvmsim.kvm.client import LocalClient, copy_from_user, copy_to_user
from kvmsim.kvm.dispatch import SystemFile, VcpuFile, VmFile, handles
from kvmsim.kvm.system import System

#: Hyper-V, nested virtualisation, dirty rings and pre-faulting; a VM has no attributes on x86, and
#: Linux has dropped KVM_GET_NR_MMU_PAGES.
NOT_SERVED = {
    "SystemFile.KVM_GET_SUPPORTED_HV_CPUID",
    "VcpuFile.KVM_GET_NESTED_STATE",
    "VcpuFile.KVM_GET_SUPPORTED_HV_CPUID",
    "VcpuFile.KVM_PRE_FAULT_MEMORY",
    "VcpuFile.KVM_SET_NESTED_STATE",
    "VmFile.KVM_GET_DEVICE_ATTR",
    "VmFile.KVM_GET_NR_MMU_PAGES",
    "VmFile.KVM_HAS_DEVICE_ATTR",
    "VmFile.KVM_HYPERV_EVENTFD",
    "VmFile.KVM_RESET_DIRTY_RINGS",
    "VmFile.KVM_SET_DEVICE_ATTR",
}
TABLES = [(SystemFile, ioctls.SYSTEM), (VmFile, ioctls.VM), (VcpuFile, ioctls.VCPU)]


@pytest.mark.parametrize(("kind", "table"), TABLES, ids=["system", "vm", "vcpu"])
def test_every_handler_is_for_a_request_of_the_table(kind, table):
    assert System is not None
    assert set(kind.HANDLERS) <= set(table.values())


def test_requests_not_served_are_known():
    unserved = {
        f"{kind.__name__}.{name}"
        for kind, table in TABLES
        for name, number in table.items()
        if number not in kind.HANDLERS
    }
    assert unserved == NOT_SERVED


def test_two_handlers_for_one_request_are_a_bug():
    with pytest.raises(ValueError, match="two handlers"):
        handles(VmFile, ioctls.KVM_CREATE_VCPU)(lambda vm, call: 0)


def test_request_number_is_taken_as_32_bits(kvm):
    assert kvm().ioctl(0xFFFFFFFF_0000AE00) == 12


def test_buffer_where_a_number_belongs_is_einval(kvm):
    with pytest.raises(KvmError) as error:
        kvm().ioctl(ioctls.KVM_GET_API_VERSION, bytearray(4))
    assert error.value.errno == EINVAL


def test_mapped_buffer_is_read_and_written_at_its_address():
    client = LocalClient(1)
    data = bytearray(b"0123456789")
    address = client.map(data)
    assert copy_from_user(client, address, 3, 2) == b"234"
    copy_to_user(client, address + 8, b"ab")
    assert data == b"01234567ab"


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (8, 3), (4096, 1)])
def test_access_beyond_a_mapped_buffer_is_efault(offset, size):
    client = LocalClient(1)
    address = client.map(bytearray(10))
    client.map(bytearray(5000))
    with pytest.raises(KvmError) as error:
        client.read(address + offset, size)
    assert error.value.errno == EFAULT


def test_buffer_standing_for_a_pointer_ends_where_it_ends():
    client = LocalClient(1)
    with pytest.raises(KvmError) as error:
        copy_from_user(client, b"1234", 5)
    assert error.value.errno == EFAULT
    with pytest.raises(KvmError):
        copy_to_user(client, bytearray(4), b"12345")
    with pytest.raises(KvmError):
        copy_to_user(client, b"read-only", b"1")
