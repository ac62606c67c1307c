"""The local APIC: registers, priorities, and who an interrupt is for."""

from errno import EINVAL

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.irq import KVM_IRQ_ROUTING, KVM_IRQ_ROUTING_ENTRY, KVM_MSI
from kvmsim.abi.structs import KVM_ENABLE_CAP
from kvmsim.engine.base import Hlt, InKernel
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.kvm import apic_messages, cpuid, events, lapic, msrs
from kvmsim.kvm.client import LocalClient
from kvmsim.kvm.lapic import Message

PAGE = 0xFEE00000
ENABLE, X2APIC = 0x800, 0x400


@pytest.fixture
def vcpus(kvm):
    """Make vCPUs whose local APICs are switched on."""

    def make(count=1, *, x2apic=False):
        vm = kvm('vendor = "intel"\n').create_vm(0, LocalClient(1))
        vm.create_irqchip()
        made = [vm.create_vcpu(number) for number in range(count)]
        table = b"".join(entry.pack() for entry in cpuid.supported(vm.machine))
        for vcpu in made:
            cpuid.set_table(vcpu, table)
            if x2apic:
                vcpu.apic_base |= X2APIC
            apic_messages.write(lapic.of(vcpu), lapic.SPIV, 0x1FF, 0)
        return made

    return make


def write(vcpu, register, value, now_ns=0):
    return apic_messages.write(lapic.of(vcpu), register, value, now_ns)


def requested(vcpus):
    """Which vCPUs have an interrupt."""
    return [vcpu.id for vcpu in vcpus if lapic.of(vcpu).irr]


# -- priorities ------------------------------------------------------------------------------------


class SlowModel:
    """Sets of vectors, as the manual tells it (SDM 3, 11.8.4)."""

    def __init__(self):
        self.requested, self.serving, self.tpr = set(), set(), 0

    def ppr(self):
        serving = max(self.serving, default=0)
        return self.tpr if self.tpr >> 4 >= serving >> 4 else serving & 0xF0

    def waiting(self):
        vector = max(self.requested, default=None)
        return vector if vector is not None and vector >> 4 > self.ppr() >> 4 else None


STEPS = st.one_of(
    st.tuples(st.just("request"), st.integers(16, 255)),
    st.tuples(st.just("tpr"), st.integers(0, 255)),
    st.tuples(st.sampled_from(["take", "end"]), st.just(0)),
)


@given(st.lists(STEPS, max_size=60))
@settings(max_examples=150, deadline=None)
def test_the_most_urgent_interrupt_above_all_priorities_comes_first(steps):
    apic, model = lapic.Lapic.__new__(lapic.Lapic), SlowModel()
    apic.vcpu = Processor()
    apic.irr = apic.isr = apic.tmr = 0
    apic.regs = bytearray(1024)
    for what, value in steps:
        if what == "request":
            apic.request(value)
            model.requested.add(value)
        elif what == "tpr":
            apic.tpr = model.tpr = value
        elif what == "take" and model.waiting() is not None:
            vector = model.waiting()
            apic.acknowledge(vector)
            model.requested.discard(vector)
            model.serving.add(vector)
        elif what == "end" and model.serving:
            vector = lapic.highest(apic.isr)
            assert vector == max(model.serving)
            apic.isr &= ~(1 << vector)
            model.serving.discard(vector)
        assert (apic.waiting(), apic.ppr) == (model.waiting(), model.ppr())
        passes = [cr8 for cr8 in range(16) if would_take(model, cr8)]
        assert apic.threshold() == (max(passes) + 1 if passes else 0)


class Processor:
    apic_base, cr8 = PAGE | ENABLE, 0


def would_take(model, cr8):
    """Whether something came if the task priority were that."""
    before, model.tpr = model.tpr, cr8 << 4
    taken = model.waiting() is not None
    model.tpr = before
    return taken


# -- registers -------------------------------------------------------------------------------------


def test_task_priority_is_cr8_and_four_bits_more(vcpus):
    (vcpu,) = vcpus()
    write(vcpu, lapic.TASKPRI, 0x5A)
    assert (vcpu.cr8, lapic.of(vcpu).read(lapic.TASKPRI, 0)) == (5, 0x5A)
    vcpu.cr8 = 7
    assert lapic.of(vcpu).read(lapic.TASKPRI, 0) == 0x70


def test_switching_it_off_masks_every_local_source(vcpus):
    (vcpu,) = vcpus()
    write(vcpu, lapic.LVT1, 0x400)
    write(vcpu, lapic.SPIV, 0xFF)
    assert lapic.of(vcpu).get(lapic.LVT1) == 0x10400
    write(vcpu, lapic.LVT1, 0x400)
    assert lapic.of(vcpu).get(lapic.LVT1) == 0x10400


@pytest.mark.parametrize(
    ("register", "value", "taken"),
    [
        (lapic.ICR, 0x44040, True),
        (lapic.ICR, 1 << 13, False),
        (lapic.ICR, 1 << 20, False),
        (lapic.ICR, 5 << 32 | 0x40, True),
        (lapic.ICR2, 0, False),
        (lapic.ID, 0, False),
        (lapic.LDR, 0, False),
        (lapic.DFR, 0, False),
        (lapic.ESR, 0, True),
        (lapic.ESR, 1, False),
        (lapic.EOI, 0, True),
        (lapic.SELF_IPI, 0xFF, True),
        (lapic.SELF_IPI, 0x100, False),
        (lapic.TASKPRI, 1 << 32, False),
        (lapic.IRR, 0, False),
    ],
)
def test_x2apic_register_takes_what_it_can_hold(vcpus, register, value, taken):
    (vcpu,) = vcpus(x2apic=True)
    assert msrs.guest_write(vcpu, 0x800 + (register >> 4), value, 0) is taken


def test_registers_are_msrs_in_x2apic_mode_only(vcpus):
    (vcpu,) = vcpus()
    assert msrs.guest_read(vcpu, 0x802, 0) is None
    assert not msrs.guest_write(vcpu, 0x808, 0, 0)
    vcpu.apic_base |= X2APIC
    assert msrs.guest_read(vcpu, 0x802, 0) == 0
    assert msrs.guest_read(vcpu, 0x80E, 0) is None


@pytest.mark.parametrize(
    ("old", "new", "taken"),
    [
        (ENABLE, ENABLE | X2APIC, True),
        (ENABLE | X2APIC, ENABLE, False),
        (ENABLE | X2APIC, 0, True),
        (0, ENABLE | X2APIC, False),
        (0, ENABLE, True),
        (ENABLE, X2APIC, False),
    ],
)
def test_modes_the_guest_can_go_to(vcpus, old, new, taken):
    (vcpu,) = vcpus()
    assert msrs.write(vcpu, 0x1B, PAGE | old, 0)
    assert msrs.guest_write(vcpu, 0x1B, PAGE | new, 0) is taken
    assert vcpu.apic_base == PAGE | (new if taken else old)


def test_x2apic_has_its_own_id_and_logical_id(vcpus):
    apic = lapic.of(vcpus(20, x2apic=True)[18])
    assert (apic.get(lapic.ID), apic.get(lapic.LDR)) == (18, 1 << 16 | 1 << 2)


def test_page_goes_out_and_in(vcpus):
    first, second = vcpus(2)
    apic = lapic.of(first)
    apic.request(0x41, level=True)
    apic.request(0x83)
    apic.acknowledge(0x83)
    write(first, lapic.TDCR, 0xB)
    write(first, lapic.LVTT, 1 << 17 | 0x55)
    write(first, lapic.TMICT, 1_000_000)
    page = bytearray(1024)
    first.ioctl(ioctls.KVM_GET_LAPIC, page, now_ns=300_000)
    second.ioctl(ioctls.KVM_SET_LAPIC, page, now_ns=5_000_000)
    other = lapic.of(second)
    assert (other.irr, other.isr, other.tmr) == (1 << 0x41, 1 << 0x83, 1 << 0x41)
    assert other.timer.due_ns == 5_700_000


def test_id_of_another_x2apic_is_refused_where_ids_are_wide(vcpus):
    first, second = vcpus(2, x2apic=True)
    page = bytearray(1024)
    second.ioctl(ioctls.KVM_GET_LAPIC, page)
    assert first.ioctl(ioctls.KVM_SET_LAPIC, page) == 0
    first.vm.ioctl(ioctls.KVM_ENABLE_CAP, bytearray(KVM_ENABLE_CAP.pack(cap=129, args=1)))
    second.ioctl(ioctls.KVM_GET_LAPIC, page)
    with pytest.raises(KvmError) as error:
        first.ioctl(ioctls.KVM_SET_LAPIC, page)
    assert error.value.errno == EINVAL


# -- destinations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "taken_by"),
    [
        (0x4040, 2 << 24, [2]),
        (0x4040, 0xFF << 24, [0, 1, 2, 3]),
        (0x4040, 9 << 24, []),
        (0x44040, 0, [1]),
        (0x84040, 0, [0, 1, 2, 3]),
        (0xC4040, 0, [0, 2, 3]),
    ],
)
def test_ipi_goes_to_whom_its_command_names(vcpus, low, high, taken_by):
    made = vcpus(4)
    write(made[1], lapic.ICR2, high)
    write(made[1], lapic.ICR, low)
    assert requested(made) == taken_by


@pytest.mark.parametrize(
    ("model", "own", "destination", "taken"),
    [
        (0xFFFFFFFF, 0x04, 0x0C, True),
        (0xFFFFFFFF, 0x04, 0x03, False),
        (0x0FFFFFFF, 0x24, 0x26, True),
        (0x0FFFFFFF, 0x24, 0x14, False),
        (0x0FFFFFFF, 0x24, 0x21, False),
        (0x0FFFFFFF, 0x24, 0xFF, True),
    ],
)
def test_logical_destination(vcpus, model, own, destination, taken):
    (vcpu,) = vcpus()
    write(vcpu, lapic.DFR, model)
    write(vcpu, lapic.LDR, own << 24)
    message = Message(0x40, destination=destination, logical=True)
    assert apic_messages.deliver(vcpu.vm, message, 0) == int(taken)


def test_logical_destination_of_an_x2apic_is_a_cluster_and_a_mask(vcpus):
    made = vcpus(20, x2apic=True)
    message = Message(0x40, destination=1 << 16 | 0b1010, logical=True)
    assert apic_messages.deliver(made[0].vm, message, 0) == 2
    assert requested(made) == [17, 19]


def test_lowest_priority_takes_turns(vcpus):
    made = vcpus(3)
    message = Message(0x40, mode=lapic.LOWEST, destination=7, logical=True)
    for number, vcpu in enumerate(made):
        write(vcpu, lapic.LDR, 1 << 24 + number)
    taken = []
    for _ in range(3):
        assert apic_messages.deliver(made[0].vm, message, 0) == 1
        taken += requested(made)
        for vcpu in made:
            lapic.of(vcpu).irr = 0
    assert sorted(taken) == [0, 1, 2]


def test_nmi_is_taken_by_an_apic_that_is_off(vcpus):
    (vcpu,) = vcpus()
    write(vcpu, lapic.SPIV, 0xFF)
    assert apic_messages.deliver(vcpu.vm, Message(0x40), 0) == 0
    assert apic_messages.deliver(vcpu.vm, Message(0, mode=lapic.NMI), 0) == 1
    assert events.of(vcpu).nmi_pending == 1


# -- split irqchip ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "reason"), [(1 << 15, Exit.IOAPIC_EOI), (0, Exit.HLT)])
def test_end_of_an_interrupt_of_an_ioapic_in_user_space(kvm, level, reason):
    vm = kvm('vendor = "intel"\n').create_vm(0, LocalClient(1))
    vm.ioctl(ioctls.KVM_ENABLE_CAP, bytearray(KVM_ENABLE_CAP.pack(cap=121, args=24)))
    vcpu = vm.create_vcpu(0)
    write(vcpu, lapic.SPIV, 0x1FF)
    entry = {"gsi": 5, "type": 2, "u.msi.address_lo": 0xFEE00000, "u.msi.data": 0x40 | level}
    routes = KVM_IRQ_ROUTING.pack(nr=1) + KVM_IRQ_ROUTING_ENTRY.pack(**entry)
    vm.ioctl(ioctls.KVM_SET_GSI_ROUTING, bytearray(routes))
    message = KVM_MSI.pack(address_lo=0xFEE00000, data=0x40 | level)
    assert vm.ioctl(ioctls.KVM_SIGNAL_MSI, message) == 1
    vcpu.engine = Scripted([InKernel(), InKernel(), Hlt()], 1)
    blocked = vcpu.kvm_run(0)
    while blocked is not None and vcpu.mp_state == 0:
        blocked = vcpu.resume(0)
    told = vcpu.run.exit_reason == Exit.IOAPIC_EOI
    assert told is (reason == Exit.IOAPIC_EOI)
    assert not told or vcpu.run.memory[32] == 0x40
