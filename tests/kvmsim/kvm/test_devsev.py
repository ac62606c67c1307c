from errno import EBUSY, EFAULT, EINVAL, EIO, ENODEV, EPERM

import pytest

from kvmsim.abi import psp
from kvmsim.abi.psp import SEV_ISSUE_CMD
from kvmsim.kvm.devsev import SevFile
from kvmsim.sev import transport

UNTOUCHED = 77
CERT = 2084


class Device:
    """/dev/sev, opened by a client."""

    def __init__(self, vmm, *, writable):
        self.vmm = vmm
        self.file = SevFile(vmm.system, writable=writable)

    def issue(self, number, data=None, *, address=None):
        """One command: errno, the firmware's answer."""
        where = address if address is not None else self.vmm.client.map(data or bytearray(1))
        cmd = psp.SEV_ISSUE_CMD_STRUCT.pack(cmd=number, data=where, error=UNTOUCHED)
        errno = self.vmm.errno(
            self.file.ioctl, SEV_ISSUE_CMD, self.vmm.client.map(cmd), self.vmm.client
        )
        return errno, psp.SEV_ISSUE_CMD_STRUCT.get(cmd, "error")

    def status(self):
        data = psp.SEV_USER_DATA_STATUS.pack()
        assert self.issue(psp.SEV_PLATFORM_STATUS, data) == (0, 0)
        return {
            name: psp.SEV_USER_DATA_STATUS.get(data, name)
            for name in ("state", "flags", "guest_count")
        }


@pytest.fixture
def reader(vmm):
    return Device(vmm, writable=False)


@pytest.fixture
def writer(vmm):
    return Device(vmm, writable=True)


def certificates(device, pdh_room=CERT, chain_room=3 * CERT):
    """PDH_CERT_EXPORT: the outcome, its structure, the two buffers."""
    layout = psp.SEV_USER_DATA_PDH_CERT_EXPORT
    pdh, chain = bytearray(max(pdh_room, 1)), bytearray(max(chain_room, 1))
    data = layout.pack(
        pdh_cert_address=device.vmm.client.map(pdh),
        pdh_cert_len=pdh_room,
        cert_chain_address=device.vmm.client.map(chain),
        cert_chain_len=chain_room,
    )
    outcome = device.issue(psp.SEV_PDH_CERT_EXPORT, data)
    lengths = layout.get(data, "pdh_cert_len"), layout.get(data, "cert_chain_len")
    return outcome, lengths, bytes(pdh), bytes(chain)


# -- order of the checks ---------------------------------------------------------------------------


def test_other_requests_are_einval(reader):
    assert reader.vmm.errno(reader.file.ioctl, 0xC0105301) == EINVAL


def test_machine_without_a_secure_processor_is_enodev_before_anything_else(kvm, vmm):
    device = SevFile(kvm('vendor = "amd"\n'))
    assert vmm.errno(device.ioctl, 0xC0105301) == ENODEV
    assert vmm.errno(device.ioctl, SEV_ISSUE_CMD, 8) == ENODEV


def test_unreadable_command_is_efault(reader):
    assert reader.vmm.errno(reader.file.ioctl, SEV_ISSUE_CMD, 8) == EFAULT


@pytest.mark.parametrize("number", [13, 14, 1000])
def test_unknown_command_is_einval_and_not_copied_back(writer, number):
    assert writer.issue(number) == (EINVAL, UNTOUCHED)


@pytest.mark.parametrize("number", [0, 2, 3, 4, 6, 11, 12])
def test_commands_that_change_the_platform_want_a_writable_file(reader, number):
    assert reader.issue(number) == (EPERM, UNTOUCHED)


@pytest.mark.parametrize("number", [1, 3, 5, 6, 7, 8, 9, 11, 12])
def test_unreadable_structure_of_a_command_is_efault(writer, number):
    errno, _ = writer.issue(number, address=8)
    assert errno == EFAULT


# -- PLATFORM_STATUS, FACTORY_RESET ----------------------------------------------------------------


def test_status_of_a_fresh_platform(reader):
    data = psp.SEV_USER_DATA_STATUS.pack()
    assert reader.issue(psp.SEV_PLATFORM_STATUS, data) == (0, 0)
    assert data == bytes((1, 55, 1)) + b"\0\1\0\0" + bytes((21, 0, 0, 0, 0))


def test_guest_count_is_of_handles_not_of_asids(reader):
    vmm = reader.vmm
    vm = vmm.guest()
    assert reader.status() == {"state": 1, "flags": 0x100, "guest_count": 0}
    vmm.start(vm)
    mirror = vmm.create()
    vmm.mirror(mirror, vm)
    assert reader.status() == {"state": 2, "flags": 0x100, "guest_count": 1}
    mirror.close()
    vm.close()
    assert reader.status() == {"state": 1, "flags": 0x100, "guest_count": 0}


def test_es_is_not_configured_without_es_asids(kvm, vmm):
    client = type(vmm)(kvm('vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 1\n'))
    assert Device(client, writable=False).status()["flags"] == 0


def test_platform_that_failed_to_initialise_says_so(kvm, vmm):
    toml = 'vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 5\n[faults]\npsp-init = true\n'
    device = Device(type(vmm)(kvm(toml)), writable=False)
    assert device.status() == {"state": 0, "flags": 0, "guest_count": 0}


def test_reset_with_guests_is_ebusy(writer):
    vm = writer.vmm.started()
    assert writer.issue(psp.SEV_FACTORY_RESET) == (EBUSY, UNTOUCHED)
    vm.close()
    assert writer.issue(psp.SEV_FACTORY_RESET) == (0, 0)
    assert writer.status()["state"] == 0


def test_init_of_a_guest_initialises_the_platform_again(writer):
    writer.issue(psp.SEV_FACTORY_RESET)
    writer.vmm.guest()
    assert writer.status()["state"] == 1


def test_start_on_a_platform_that_was_reset_in_between_is_refused(writer):
    vm = writer.vmm.guest()
    writer.issue(psp.SEV_FACTORY_RESET)
    assert writer.vmm.start(vm).answer == (EIO, 1)


# -- certificates ----------------------------------------------------------------------------------


def test_certificates_are_exported_to_a_reader(reader):
    outcome, lengths, pdh, chain = certificates(reader)
    assert outcome == (0, 0)
    assert lengths == (CERT, 3 * CERT)
    assert transport.public_of(pdh) == reader.vmm.system.firmware.platform.pdh_public
    assert transport.public_of(chain[:CERT]) == reader.vmm.system.firmware.platform.pek_public


@pytest.mark.parametrize("rooms", [(0, 0), (0, 9000), (CERT, 1)])
def test_certificate_length_query(reader, rooms):
    outcome, lengths, _, _ = certificates(reader, *rooms)
    assert outcome == (EIO, 4)
    assert lengths == (CERT, 3 * CERT)


@pytest.mark.parametrize("rooms", [(16385, 9000), (CERT, 16385)])
def test_certificates_into_huge_buffers_are_efault(reader, rooms):
    assert certificates(reader, *rooms)[0] == (EFAULT, UNTOUCHED)


def test_export_from_a_platform_that_is_not_initialised_wants_a_writable_file(reader, writer):
    writer.issue(psp.SEV_FACTORY_RESET)
    assert certificates(reader)[0] == (EPERM, UNTOUCHED)
    assert certificates(writer)[0] == (0, 0)
    assert certificates(reader)[0] == (0, 0)


def test_new_keys_make_new_certificates(writer):
    before = certificates(writer)
    assert writer.issue(psp.SEV_PDH_GEN) == (0, 0)
    middle = certificates(writer)
    assert writer.issue(psp.SEV_PEK_GEN) == (0, 0)
    after = certificates(writer)
    assert before[2] != middle[2] != after[2]
    assert before[3] == middle[3] != after[3]


def test_new_endorsement_key_while_guests_run_is_refused(writer):
    writer.vmm.started()
    assert writer.issue(psp.SEV_PEK_GEN) == (EIO, 1)
    assert writer.issue(psp.SEV_PDH_GEN) == (0, 0)


def csr(device, room):
    layout = psp.SEV_USER_DATA_PEK_CSR
    address, buffer = device.vmm.memory(bytes(max(room, 1)))
    data = layout.pack(address=address, length=room)
    return device.issue(psp.SEV_PEK_CSR, data), layout.get(data, "length"), bytes(buffer)


def test_signing_request(writer):
    assert csr(writer, 0)[:2] == ((EIO, 4), CERT)
    assert csr(writer, 16385)[0] == (EFAULT, UNTOUCHED)
    outcome, length, request = csr(writer, CERT)
    assert (outcome, length) == ((0, 0), CERT)
    assert transport.public_of(request)


def import_certificates(device, pek, oca):
    data = psp.SEV_USER_DATA_PEK_CERT_IMPORT.pack(
        pek_cert_address=device.vmm.memory(pek)[0],
        pek_cert_len=len(pek),
        oca_cert_address=device.vmm.memory(oca)[0],
        oca_cert_len=len(oca),
    )
    return device.issue(psp.SEV_PEK_CERT_IMPORT, data)


def test_imported_certificates_make_the_platform_owned_once(writer):
    signed = csr(writer, CERT)[2]
    oca = transport.certificate(b"OCA", bytes(32))
    assert import_certificates(writer, oca, oca) == (EIO, 6)
    assert import_certificates(writer, signed, oca) == (0, 0)
    assert writer.status()["flags"] == 0x101
    assert certificates(writer)[3][CERT : 2 * CERT] == oca
    assert import_certificates(writer, signed, oca) == (EIO, 5)
    writer.issue(psp.SEV_FACTORY_RESET)
    assert writer.status()["flags"] == 0x100


def test_import_of_nothing_is_einval(writer):
    assert import_certificates(writer, b"", b"x") == (EINVAL, UNTOUCHED)


# -- ids -------------------------------------------------------------------------------------------


def test_old_id_command_gives_two_sockets(reader):
    data = bytearray(b"\xff" * 128)
    assert reader.issue(psp.SEV_GET_ID, data) == (0, 0)
    assert data[:64] == reader.vmm.system.firmware.platform.chip_id
    assert data[64:] == bytes(64)


def get_id(device, room):
    layout = psp.SEV_USER_DATA_GET_ID2
    address, buffer = device.vmm.memory(bytes(max(room, 1)))
    data = layout.pack(address=address, length=room)
    return device.issue(psp.SEV_GET_ID2, data), layout.get(data, "length"), bytes(buffer)


def test_id_command(reader):
    assert get_id(reader, 0)[:2] == ((EIO, 4), 64)
    outcome, length, chip_id = get_id(reader, 64)
    assert (outcome, length) == ((0, 0), 64)
    assert chip_id == reader.vmm.system.firmware.platform.chip_id


@pytest.mark.parametrize("command", [psp.SEV_GET_ID, psp.SEV_GET_ID2])
def test_id_from_an_old_firmware_is_not_supported(reader, command):
    reader.vmm.system.firmware.platform.version = bytes((0, 15, 0))
    assert reader.issue(command, bytearray(128)) == (524, UNTOUCHED)


# -- SNP -------------------------------------------------------------------------------------------


def test_snp_status_counts_snp_guests(reader):
    data = psp.SEV_USER_DATA_SNP_STATUS.pack()
    assert reader.issue(psp.SNP_PLATFORM_STATUS, data) == (0, 0)
    get = psp.SEV_USER_DATA_SNP_STATUS.get
    assert (get(data, "api_major"), get(data, "state"), get(data, "guest_count")) == (1, 1, 0)


@pytest.mark.parametrize(
    ("number", "errno"), [(9, EINVAL), (10, ENODEV), (11, ENODEV), (12, ENODEV)]
)
def test_snp_commands_on_a_machine_without_snp(kvm, vmm, number, errno):
    client = type(vmm)(kvm('vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 5\n'))
    assert Device(client, writable=True).issue(number, bytearray(64))[0] == errno


def test_snp_configuration_shows_in_the_status(writer):
    config = psp.SEV_USER_DATA_SNP_CONFIG.pack(reported_tcb=7, flags=1)
    assert writer.issue(psp.SNP_SET_CONFIG, config)[0] == 0
    data = psp.SEV_USER_DATA_SNP_STATUS.pack()
    writer.issue(psp.SNP_PLATFORM_STATUS, data)
    assert psp.SEV_USER_DATA_SNP_STATUS.get(data, "reported_tcb_version") == 7


def test_snp_commit(reader):
    assert reader.issue(psp.SNP_COMMIT)[0] == 0


@pytest.mark.parametrize(
    ("length", "version", "errno"), [(16, 0, 0), (15, 0, EINVAL), (16, 1, EINVAL)]
)
def test_snp_endorsement_key(writer, length, version, errno):
    blob, _ = writer.vmm.memory(bytes(432))
    layout = psp.SEV_USER_DATA_SNP_VLEK_LOAD
    data = layout.pack(len=length, vlek_wrapped_version=version, vlek_wrapped_address=blob)
    assert writer.issue(psp.SNP_VLEK_LOAD, data)[0] == errno


@pytest.mark.parametrize("number", [9, 11, 12])
def test_snp_commands_without_a_structure_are_einval(writer, number):
    assert writer.issue(number, address=0)[0] == EINVAL
