from errno import EBUSY, EEXIST, EFAULT, EINVAL, ENODEV, ENOENT, ENOTTY, ENXIO

import pytest

from kvmsim.abi import ioctls, irq, memory, regs
from kvmsim.abi.structs import KVM_ENABLE_CAP

DONE, INVALID = (0, 0), (-1, EINVAL)


@pytest.fixture
def chips(world, vm):
    """A VM with interrupt controllers."""
    assert world.ioctl(vm, ioctls.KVM_CREATE_IRQCHIP) == DONE
    return vm


@pytest.fixture
def split(world, vm):
    assert world.ioctl(vm, ioctls.KVM_ENABLE_CAP, KVM_ENABLE_CAP.pack(cap=121, args=24)) == DONE
    return vm


def get_chip(world, vm, chip_id):
    data = irq.KVM_IRQCHIP.pack(chip_id=chip_id)
    return world.ioctl(vm, ioctls.KVM_GET_IRQCHIP, data), bytes(data[8:])


def level(number, up):
    return irq.KVM_IRQ_LEVEL.pack(irq=number, level=up)


@pytest.mark.parametrize(
    ("request_number", "arg", "expected"),
    [
        pytest.param(ioctls.KVM_SET_TSS_ADDR, 0xFFFBD000, DONE, id="row 58"),
        pytest.param(ioctls.KVM_SET_TSS_ADDR, 0xFFFFF000, INVALID, id="row 58 too high"),
        pytest.param(ioctls.KVM_SET_TSS_ADDR, 0xFFFFD000, DONE, id="row 58 highest"),
        pytest.param(ioctls.KVM_CREATE_PIT2, bytearray(64), (-1, ENOENT), id="row 60"),
        pytest.param(ioctls.KVM_CREATE_PIT2, 0, (-1, EFAULT), id="row 60 null"),
        pytest.param(ioctls.KVM_IRQ_LINE, level(1, 1), (-1, ENXIO), id="row 61"),
        pytest.param(ioctls.KVM_IRQ_LINE_STATUS, level(1, 1), (-1, ENXIO), id="row 61 status"),
        pytest.param(ioctls.KVM_GET_IRQCHIP, bytearray(520), (-1, ENXIO), id="row 61 get"),
        pytest.param(ioctls.KVM_SET_IRQCHIP, bytearray(520), (-1, ENXIO), id="row 61 set"),
        pytest.param(ioctls.KVM_GET_PIT2, bytearray(112), (-1, ENXIO), id="no timer"),
        pytest.param(ioctls.KVM_SET_PIT2, bytearray(112), (-1, ENXIO), id="no timer to set"),
        pytest.param(
            ioctls.KVM_REINJECT_CONTROL, bytearray(32), (-1, ENXIO), id="no timer to tune"
        ),
        pytest.param(ioctls.KVM_SET_BOOT_CPU_ID, 1, DONE, id="row 63"),
        pytest.param(ioctls.KVM_SET_IDENTITY_MAP_ADDR, bytearray(8), DONE, id="row 59"),
        pytest.param(ioctls.KVM_SET_GSI_ROUTING, bytearray(8), INVALID, id="routes without chips"),
        pytest.param(ioctls.KVM_SIGNAL_MSI, bytearray(32), INVALID, id="message without APICs"),
        pytest.param(ioctls.KVM_SET_NR_MMU_PAGES, 63, INVALID, id="shadow pages"),
        pytest.param(ioctls.KVM_SET_NR_MMU_PAGES, 64, DONE, id="shadow pages, fewest"),
        pytest.param(
            ioctls.KVM_CREATE_DEVICE, bytearray(b"\x63" + bytes(11)), (-1, ENODEV), id="device"
        ),
        pytest.param(ioctls.KVM_HAS_DEVICE_ATTR, bytearray(24), (-1, ENOTTY), id="attributes"),
    ],
)
def test_vm_without_chips(world, vm, request_number, arg, expected):
    assert world.ioctl(vm, request_number, arg) == expected


def test_rows_59_and_63_too_late_after_a_vcpu(world, vm, vcpu):
    assert world.ioctl(vm, ioctls.KVM_SET_IDENTITY_MAP_ADDR, bytearray(8)) == INVALID
    assert world.ioctl(vm, ioctls.KVM_SET_BOOT_CPU_ID, 0) == (-1, EBUSY)


def test_row_63_chosen_vcpu_starts_by_itself(world, chips):
    assert world.ioctl(chips, ioctls.KVM_SET_BOOT_CPU_ID, 1) == DONE
    states = []
    for vcpu_id in range(2):
        vcpu = world.make(chips, ioctls.KVM_CREATE_VCPU, vcpu_id)
        state, sregs = bytearray(4), bytearray(312)
        world.ioctl(vcpu, ioctls.KVM_GET_MP_STATE, state)
        world.ioctl(vcpu, ioctls.KVM_GET_SREGS, sregs)
        states.append((state[0], regs.KVM_SREGS.get(sregs, "apic_base")))
    assert states == [(1, 0xFEE00800), (0, 0xFEE00900)]


def test_controllers_after_they_were_made(world, chips):
    master, slave, ioapic = (get_chip(world, chips, chip_id) for chip_id in range(3))
    assert master == (DONE, bytes(15) + b"\xf8" + bytes(496))
    assert slave == (DONE, bytes(15) + b"\xde" + bytes(496))
    assert irq.KVM_IOAPIC_STATE.get(ioapic[1], "base_address") == 0xFEC00000
    entries = [irq.KVM_IOAPIC_STATE.get(ioapic[1], "redirtbl", pin) for pin in range(24)]
    assert entries == [1 << 16] * 24
    assert get_chip(world, chips, 3)[0] == INVALID


def test_controller_reads_back_what_was_set(world, chips):
    data = irq.KVM_IRQCHIP.pack(chip_id=0)
    data[8 + 2] = 0xFB
    data[8 + 5] = 0x20
    assert world.ioctl(chips, ioctls.KVM_SET_IRQCHIP, data) == DONE
    got = get_chip(world, chips, 0)[1]
    assert (got[2], got[5]) == (0xFB, 0x20)
    data = irq.KVM_IRQCHIP.pack(chip_id=9)
    assert world.ioctl(chips, ioctls.KVM_SET_IRQCHIP, data) == INVALID


def test_line_is_seen_by_the_pic(world, chips):
    assert world.ioctl(chips, ioctls.KVM_IRQ_LINE, level(3, 1)) == DONE
    got = get_chip(world, chips, 0)[1]
    assert (got[0], got[1]) == (8, 8)
    assert world.ioctl(chips, ioctls.KVM_IRQ_LINE, level(3, 0)) == DONE
    got = get_chip(world, chips, 0)[1]
    assert (got[0], got[1]) == (0, 8)


def test_split_chips_are_not_in_the_kernel(world, split):
    assert get_chip(world, split, 0)[0] == (-1, ENXIO)
    assert world.ioctl(split, ioctls.KVM_CREATE_PIT2, bytearray(64)) == (-1, ENOENT)
    assert world.ioctl(split, ioctls.KVM_CREATE_IRQCHIP) == (-1, EEXIST)


def test_row_60_timer_twice_and_its_state(world, chips):
    answers = [world.ioctl(chips, ioctls.KVM_CREATE_PIT2, bytearray(64)) for _ in range(2)]
    assert answers == [DONE, (-1, EEXIST)]
    data = bytearray(112)
    assert world.ioctl(chips, ioctls.KVM_GET_PIT2, data) == DONE
    get = irq.KVM_PIT_STATE2.get
    channels = [
        tuple(get(data, f"channels[{channel}].{name}") for name in ("count", "mode", "gate"))
        for channel in range(3)
    ]
    assert channels == [(0x10000, 0xFF, 1), (0x10000, 0xFF, 1), (0x10000, 0xFF, 0)]
    assert world.ioctl(chips, ioctls.KVM_SET_PIT2, data) == DONE
    assert world.ioctl(chips, ioctls.KVM_REINJECT_CONTROL, bytearray(32)) == DONE


def route(gsi, kind, first=0, second=0, *, flags=0):
    return irq.KVM_IRQ_ROUTING_ENTRY.pack(
        **{
            "gsi": gsi,
            "type": kind,
            "flags": flags,
            "u.msi.address_lo": first,
            "u.msi.address_hi": second,
        }
    )


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        pytest.param([], DONE, id="none"),
        pytest.param([route(0, 1, 2, 2), route(1, 1, 0, 1)], DONE, id="pins"),
        pytest.param([route(24, 2, 0xFEE00000)], DONE, id="message"),
        pytest.param([route(0, 1, 2, 24)], INVALID, id="pin of the IOAPIC"),
        pytest.param([route(0, 1, 0, 8)], INVALID, id="pin of the PIC"),
        pytest.param([route(0, 1, 3, 0)], INVALID, id="chip"),
        pytest.param([route(4096, 2, 0xFEE00000)], INVALID, id="number"),
        pytest.param([route(0, 9)], INVALID, id="type"),
        pytest.param([route(0, 1, 2, 2, flags=1)], INVALID, id="flags"),
    ],
)
def test_routes(world, chips, entries, expected):
    data = irq.KVM_IRQ_ROUTING.pack(nr=len(entries)) + b"".join(entries)
    assert world.ioctl(chips, ioctls.KVM_SET_GSI_ROUTING, data) == expected


@pytest.mark.parametrize("values", [{"nr": 4097}, {"flags": 1}])
def test_table_of_routes(world, chips, values):
    data = irq.KVM_IRQ_ROUTING.pack(**values)
    assert world.ioctl(chips, ioctls.KVM_SET_GSI_ROUTING, data) == INVALID
    assert world.ioctl(chips, ioctls.KVM_SET_GSI_ROUTING, 0) == (-1, EFAULT)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"len": 3}, INVALID),
        ({"len": 4, "addr": (1 << 64) - 2}, INVALID),
        ({"len": 4, "flags": 1 << 8}, INVALID),
        ({"len": 0, "flags": 1}, INVALID),
    ],
)
def test_ioeventfd_that_makes_no_sense(world, vm, values, expected):
    data = irq.KVM_IOEVENTFD.pack(**{"fd": 0xFFFFFFFF, **values})
    assert world.ioctl(vm, ioctls.KVM_IOEVENTFD, data) == expected


@pytest.mark.parametrize("flags", [4, 1 << 8])
def test_irqfd_that_makes_no_sense(world, chips, flags):
    data = irq.KVM_IRQFD.pack(fd=0xFFFFFFFF, flags=flags)
    assert world.ioctl(chips, ioctls.KVM_IRQFD, data) == INVALID


@pytest.mark.parametrize(
    ("values", "expected"), [({}, DONE), ({"pio": 1}, DONE), ({"pio": 2}, INVALID)]
)
def test_coalesced_zone(world, vm, values, expected):
    data = memory.KVM_COALESCED_MMIO_ZONE.pack(addr=0xB8000, size=4096, **values)
    assert world.ioctl(vm, ioctls.KVM_REGISTER_COALESCED_MMIO, data) == expected
    assert world.ioctl(vm, ioctls.KVM_UNREGISTER_COALESCED_MMIO, data) == expected


def test_row_65_apic_that_is_not_in_the_kernel(world, vcpu):
    assert world.ioctl(vcpu, ioctls.KVM_GET_LAPIC, bytearray(1024)) == INVALID
    assert world.ioctl(vcpu, ioctls.KVM_SET_LAPIC, bytearray(1024)) == INVALID
    assert world.ioctl(vcpu, ioctls.KVM_SET_VAPIC_ADDR, bytearray(8)) == INVALID


def test_apics_after_reset(world, chips):
    pages = []
    for vcpu_id in range(2):
        vcpu = world.make(chips, ioctls.KVM_CREATE_VCPU, vcpu_id)
        page = bytearray(1024)
        assert world.ioctl(vcpu, ioctls.KVM_GET_LAPIC, page) == DONE
        pages.append({at: int.from_bytes(page[at : at + 4], "little") for at in range(0, 1024, 16)})
    common = {0xE0: 0xFFFFFFFF, 0xF0: 0xFF, 0x30: 0x50014}
    common |= dict.fromkeys((0x320, 0x330, 0x340, 0x360, 0x370), 0x10000)
    boot = common | {0x350: 0x700}
    other = common | {0x20: 0x01000000, 0x350: 0x10000}
    assert [{at: value for at, value in page.items() if value} for page in pages] == [boot, other]


def test_apic_reads_back_what_was_set(world, chips):
    vcpu = world.make(chips, ioctls.KVM_CREATE_VCPU)
    page = bytearray(1024)
    world.ioctl(vcpu, ioctls.KVM_GET_LAPIC, page)
    page[0x80], page[0xF1] = 0x50, 0x01
    assert world.ioctl(vcpu, ioctls.KVM_SET_LAPIC, page) == DONE
    again = bytearray(1024)
    world.ioctl(vcpu, ioctls.KVM_GET_LAPIC, again)
    assert again[0x80] == 0x50
    assert again[0xF1] == 0x01


def interrupt(world, vcpu, vector):
    return world.ioctl(vcpu, ioctls.KVM_INTERRUPT, bytearray(vector.to_bytes(4, "little")))


def test_row_106_interrupt_without_chips(world, vcpu):
    assert [interrupt(world, vcpu, vector) for vector in (256, 32, 33)] == [INVALID, DONE, DONE]


def test_row_106_interrupt_with_a_pic(world, chips):
    vcpu = world.make(chips, ioctls.KVM_CREATE_VCPU)
    assert interrupt(world, vcpu, 32) == (-1, ENXIO)


def test_interrupt_with_a_split_irqchip(world, split):
    vcpu = world.make(split, ioctls.KVM_CREATE_VCPU)
    assert [interrupt(world, vcpu, vector) for vector in (32, 33)] == [DONE, (-1, EEXIST)]


def test_nmi_is_queued(world, vcpu):
    assert world.ioctl(vcpu, ioctls.KVM_NMI) == DONE
    events = bytearray(64)
    world.ioctl(vcpu, ioctls.KVM_GET_VCPU_EVENTS, events)
    assert regs.KVM_VCPU_EVENTS.get(events, "nmi.pending") == 1


def test_access_reports(world, vcpu):
    assert world.ioctl(vcpu, ioctls.KVM_TPR_ACCESS_REPORTING, bytearray(b"\1" + bytes(39))) == DONE
    flags = bytearray(b"\1\0\0\0\1" + bytes(35))
    assert world.ioctl(vcpu, ioctls.KVM_TPR_ACCESS_REPORTING, flags) == INVALID


@pytest.mark.parametrize(
    ("state", "answer", "read_back"),
    [
        (0, DONE, 0),
        (1, DONE, 1),
        (2, DONE, 2),
        (3, DONE, 3),
        (4, DONE, 0),
        (5, INVALID, 0),
        (8, INVALID, 0),
        (9, DONE, 9),
        (10, INVALID, 0),
    ],
)
def test_row_66_states_of_a_vcpu_with_an_apic(world, chips, state, answer, read_back):
    vcpu = world.make(chips, ioctls.KVM_CREATE_VCPU)
    data = bytearray(state.to_bytes(4, "little"))
    assert world.ioctl(vcpu, ioctls.KVM_SET_MP_STATE, data) == answer
    world.ioctl(vcpu, ioctls.KVM_GET_MP_STATE, data)
    assert data[0] == read_back


@pytest.mark.parametrize(
    ("setter", "size_bytes"), [(ioctls.KVM_SET_PIT, 72), (ioctls.KVM_SET_PIT2, 112)]
)
def test_count_of_zero_is_the_longest(world, chips, setter, size_bytes):
    world.ioctl(chips, ioctls.KVM_CREATE_PIT2, bytearray(64))
    assert world.ioctl(chips, setter, bytearray(size_bytes)) == DONE
    data = bytearray(112)
    world.ioctl(chips, ioctls.KVM_GET_PIT2, data)
    get = irq.KVM_PIT_STATE2.get
    assert [get(data, f"channels[{channel}].count") for channel in range(3)] == [0x10000] * 3
    assert get(data, "channels[0].count_load_time") == 0


def test_slave_tells_the_master_of_its_lines(world, chips):
    assert world.ioctl(chips, ioctls.KVM_IRQ_LINE, level(10, 1)) == DONE
    master, slave = (get_chip(world, chips, chip_id)[1] for chip_id in range(2))
    assert (master[0], master[1], slave[0], slave[1]) == (0, 4, 4, 4)


@pytest.mark.parametrize(("number", "pins"), [(0, 1), (1, 2), (23, 1 << 23), (24, 0)])
def test_line_is_seen_by_the_ioapic(world, chips, number, pins):
    assert world.ioctl(chips, ioctls.KVM_IRQ_LINE, level(number, 1)) == DONE
    ioapic = get_chip(world, chips, 2)[1]
    assert irq.KVM_IOAPIC_STATE.get(ioapic, "irr") == pins


def test_status_of_a_line(world, chips):
    answers = []
    for number, up in ((3, 1), (3, 1), (3, 0), (3, 1), (20, 1), (20, 1), (100, 1)):
        data = level(number, up)
        assert world.ioctl(chips, ioctls.KVM_IRQ_LINE_STATUS, data) == DONE
        answers.append(irq.KVM_IRQ_LEVEL.get(data, "irq"))
    assert answers == [1, 1, 2, 0, 0xFFFFFFFF, 0, 0xFFFFFFFF]
