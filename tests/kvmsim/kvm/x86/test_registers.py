"""Registers between KVM and guests that execute code, by way of the ioctls and the page."""

import struct
from errno import EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.regs import KVM_SREGS
from kvmsim.abi.run import SYNC_REGS_OFFSET, SYNC_SREGS_OFFSET
from kvmsim.abi.structs import KVM_REGS
from kvmsim.errors import KvmError

pytest.importorskip("unicorn")

INTEL = 'vendor = "intel"\n'
HLT = "f4"
DATA = 0x8000
XSETBV = "0f 01 d1"


def sregs(guest):
    data = bytearray(312)
    guest.vcpu.ioctl(ioctls.KVM_GET_SREGS, data)
    return data


def xsave(guest):
    data = bytearray(4096)
    guest.vcpu.ioctl(ioctls.KVM_GET_XSAVE, data)
    return data


def set_osxsave(guest):
    data = sregs(guest)
    KVM_SREGS.put(data, "cr4", KVM_SREGS.get(data, "cr4") | 1 << 18)
    guest.vcpu.ioctl(ioctls.KVM_SET_SREGS, data)


def test_registers_of_the_page_go_both_ways(start):
    guest = start(INTEL, HLT, "48 89 d8", HLT)  # mov rax, rbx
    page = guest.vcpu.run
    page.kvm_valid_regs = 3
    assert guest.run() == Exit.HLT
    regs = bytearray(page.memory[SYNC_REGS_OFFSET : SYNC_REGS_OFFSET + 144])
    shown = bytes(page.memory[SYNC_SREGS_OFFSET : SYNC_SREGS_OFFSET + 312])
    assert KVM_REGS.get(regs, "rip") == 0x1001
    assert KVM_SREGS.get(shown, "cs.l") == 1
    KVM_REGS.put(regs, "rbx", 0x1234)
    page.memory[SYNC_REGS_OFFSET : SYNC_REGS_OFFSET + 144] = regs
    page.kvm_dirty_regs = 1
    assert guest.run() == Exit.HLT
    regs = bytes(page.memory[SYNC_REGS_OFFSET : SYNC_REGS_OFFSET + 144])
    assert KVM_REGS.get(regs, "rax") == 0x1234


@pytest.mark.parametrize(
    ("name", "value"),
    [("cr4", 1 << 40), ("efer", 0x400), ("cr0", 0x80000000), ("apic_base", 1 << 60)],
)
def test_refused_system_registers_leave_the_guest_as_it_was(start, name, value):
    guest = start(INTEL, HLT, "0f 20 e0", HLT)  # mov rax, cr4
    assert guest.run() == Exit.HLT
    before = sregs(guest)
    data = bytearray(before)
    KVM_SREGS.put(data, name, value)
    KVM_SREGS.put(data, "gs.base", 0x5555)
    with pytest.raises(KvmError) as error:
        guest.vcpu.ioctl(ioctls.KVM_SET_SREGS, data)
    assert error.value.errno == EINVAL
    assert sregs(guest) == before
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == KVM_SREGS.get(before, "cr4")


def test_segment_user_space_sets_is_the_guests(start):
    guest = start(INTEL, HLT, "65 48 8b 04 25 00 00 00 00", HLT)  # mov rax, gs:[0]
    assert guest.run() == Exit.HLT
    data = sregs(guest)
    KVM_SREGS.put(data, "gs.base", DATA)
    guest.vcpu.ioctl(ioctls.KVM_SET_SREGS, data)
    guest.word(DATA, 0xFEED)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0xFEED


def test_floating_point_registers_go_both_ways(start):
    guest = start(INTEL, "0f 57 c0", HLT, "f2 0f 58 c0", HLT)  # xorps xmm0; addsd xmm0, xmm0
    assert guest.run() == Exit.HLT
    area = xsave(guest)
    area[160:168] = struct.pack("<d", 1.25)
    area[512] |= 2
    guest.vcpu.ioctl(ioctls.KVM_SET_XSAVE, area)
    assert guest.run() == Exit.HLT
    assert struct.unpack_from("<d", xsave(guest), 160) == (2.5,)


def test_component_that_is_not_in_the_area_is_as_after_reset(start):
    guest = start(INTEL, "66 0f 76 c0", HLT, "66 0f 7e c0", HLT)  # pcmpeqd; movd eax, xmm0
    assert guest.run() == Exit.HLT
    area = xsave(guest)
    area[512] = 1
    guest.vcpu.ioctl(ioctls.KVM_SET_XSAVE, area)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0


def test_control_register_of_xsave_goes_both_ways(start):
    guest = start(INTEL, "31 c9", "31 d2", "b8 03 00 00 00", XSETBV, HLT, "0f 01 d0", HLT)
    guest.offer_everything()
    set_osxsave(guest)
    assert guest.run() == Exit.HLT
    data = bytearray(392)
    guest.vcpu.ioctl(ioctls.KVM_GET_XCRS, data)
    assert struct.unpack_from("<Q", data, 16) == (3,)
    struct.pack_into("<Q", data, 16, 7)
    guest.vcpu.ioctl(ioctls.KVM_SET_XCRS, data)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 7


def test_component_the_guest_does_not_have_cannot_be_enabled(start):
    guest = start(INTEL, "31 c9", "31 d2", "b8 03 00 00 00", XSETBV, HLT).gate(13, "b3 0d", HLT)
    set_osxsave(guest)
    assert guest.run() == Exit.HLT
    assert guest.regs("rbx") & 0xFF == 0xD


def test_task_priority_is_in_the_page(start):
    guest = start(INTEL, "b8 05 00 00 00", "44 0f 22 c0", HLT)  # mov cr8, rax
    assert guest.run() == Exit.HLT
    assert guest.vcpu.run.cr8 == 5
    assert KVM_SREGS.get(sregs(guest), "cr8") == 5


def test_debug_registers_the_guest_loads_are_shown(start):
    guest = start(INTEL, "b8 34 12 00 00", "0f 23 d8", HLT)  # mov dr3, rax
    assert guest.run() == Exit.HLT
    data = bytearray(128)
    guest.vcpu.ioctl(ioctls.KVM_GET_DEBUGREGS, data)
    assert struct.unpack_from("<Q", data, 24) == (0x1234,)


def test_debug_registers_user_space_sets_are_the_guests(start):
    guest = start(INTEL, HLT, "0f 21 d0", HLT)  # mov rax, dr2
    assert guest.run() == Exit.HLT
    data = bytearray(128)
    guest.vcpu.ioctl(ioctls.KVM_GET_DEBUGREGS, data)
    struct.pack_into("<Q", data, 16, 0x4321)
    guest.vcpu.ioctl(ioctls.KVM_SET_DEBUGREGS, data)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0x4321


def test_init_keeps_floating_point_registers_and_forgets_the_others(start):
    guest = start(INTEL, "66 0f 76 c0", "b8 77 00 00 00", HLT)
    assert guest.run() == Exit.HLT
    guest.vcpu.init()
    assert (guest.regs("rax"), guest.regs("rip")) == (0, 0xFFF0)
    assert KVM_SREGS.get(sregs(guest), "cs.base") == 0xFFFF0000
    assert xsave(guest)[160:176] == b"\xff" * 16


def test_look_at_a_guest_that_executes_elsewhere_changes_nothing(start):
    guest = start(INTEL, "ff c3", "ff c3", HLT)  # inc ebx
    guest.engine.inline_bytes = 0
    blocked = guest.vcpu.kvm_run(0)
    while blocked is not None:
        if blocked.work is not None:
            blocked.work.work()
            guest.regs("rbx")
            sregs(guest)
        blocked = guest.vcpu.resume(0)
    assert guest.vcpu.run.exit_reason == Exit.HLT
    assert (guest.regs("rbx"), guest.regs("rip")) == (2, 0x1005)
