from errno import EBUSY, EINVAL

import pytest

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.structs import KVM_CPUID2, KVM_CPUID_ENTRY2, KVM_DEBUGREGS, KVM_GUEST_DEBUG
from kvmsim.engine.base import BusLock, Hlt
from kvmsim.engine.scripted import Scripted
from kvmsim.errors import KvmError
from kvmsim.kvm import debug
from kvmsim.kvm.run import InGuest
from kvmsim.kvm.vm import KvmEnableCap

PID = 4194304
BOTH = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n'
NO_DETECT = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\n'
AMD = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\ndetect = true\n'
DEBUGCTL = 0x1D9


def leaf7(ebx=0, ecx=0):
    entry = KVM_CPUID_ENTRY2.pack(function=7, flags=1, ebx=ebx, ecx=ecx)
    return KVM_CPUID2.pack(nent=2) + KVM_CPUID_ENTRY2.pack(function=1) + entry


@pytest.fixture
def make(kvm):
    """Make a vCPU; its guest has the bus lock #DB if the test gives it the CPUID bit."""

    def make(toml=BOTH, *, exposed=True, exits=True, stops=()):
        vm = kvm(toml).create_vm(0, PID)
        if exits:
            vm.enable_cap(KvmEnableCap(193, (2,)))
        vcpu = vm.create_vcpu(0)
        if exposed:
            vcpu.ioctl(ioctls.KVM_SET_CPUID2, leaf7(ecx=1 << 24))
        vcpu.engine = Scripted(list(stops))
        return vcpu

    return make


def set_msrs(vcpu, *pairs):
    data = bytearray(8) + b"".join(
        index.to_bytes(8, "little") + value.to_bytes(8, "little") for index, value in pairs
    )
    data[0] = len(pairs)
    return vcpu.ioctl(ioctls.KVM_SET_MSRS, data)


def debugctl(vcpu):
    data = bytearray(24)
    data[0] = 1
    data[8:10] = DEBUGCTL.to_bytes(2, "little")
    assert vcpu.ioctl(ioctls.KVM_GET_MSRS, data) == 1
    return int.from_bytes(data[16:24], "little")


def dr6(vcpu):
    data = bytearray(128)
    vcpu.ioctl(ioctls.KVM_GET_DEBUGREGS, data)
    return KVM_DEBUGREGS.get(data, "dr6")


def run_to_exit(vcpu):
    blocked = vcpu.kvm_run(0)
    while blocked is not None:
        blocked = vcpu.resume(0)
    return vcpu.run.exit_reason


@pytest.mark.parametrize(
    ("value", "none", "rtm", "detect", "both"),
    [
        (0, 0xFFFF0FF0, 0xFFFE0FF0, 0xFFFF07F0, 0xFFFE07F0),
        (0xFFFF0FF0, 0xFFFF0FF0, 0xFFFF0FF0, 0xFFFF0FF0, 0xFFFF0FF0),
        (0x00000800, 0xFFFF0FF0, 0xFFFE0FF0, 0xFFFF0FF0, 0xFFFE0FF0),
        (0xFFFFFFFF, 0xFFFFEFFF, 0xFFFFEFFF, 0xFFFFEFFF, 0xFFFFEFFF),
    ],
)
def test_t_b_1_mov_to_dr6_keeps_the_fixed_bits_of_the_guest(value, none, rtm, detect, both):
    written = [
        debug.dr6_written(value, bus_lock_detect=bld, rtm=has_rtm)
        for bld, has_rtm in ((False, False), (False, True), (True, False), (True, True))
    ]
    assert written == [none, rtm, detect, both]


@pytest.mark.parametrize(
    ("before", "payload", "after"),
    [
        (0xFFFF0FF0, 0x0800, 0xFFFF07F0),
        (0xFFFF0FF0, 0x4800, 0xFFFF47F0),
        (0xFFFF0FF0, 0x1802, 0xFFFF07F2),
        (0xFFFF07F0, 0x4000, 0xFFFF47F0),
        (0xFFFF07F0, 0x1001, 0xFFFF07F1),
        (0xFFFF0FF0, 0x0000, 0xFFFF0FF0),
    ],
)
def test_t_b_1_delivery_puts_the_payload_into_dr6(before, payload, after):
    assert debug.dr6_after(before, payload) == after


def test_only_subleaf_0_of_cpuid_7_says_what_the_guest_has(make):
    vcpu = make(exposed=False)
    other = KVM_CPUID_ENTRY2.pack(function=7, index=1, flags=1, ebx=1 << 11)
    first = KVM_CPUID_ENTRY2.pack(function=7, index=0, flags=1, ecx=1 << 24)
    vcpu.ioctl(ioctls.KVM_SET_CPUID2, KVM_CPUID2.pack(nent=2) + other + first)
    assert debug.has_bus_lock_detect(vcpu)
    assert not debug.has_rtm(vcpu)


def test_guests_mov_to_dr6_follows_its_cpuid(make):
    vcpu = make()
    assert debug.write_dr6(vcpu, 0)
    assert dr6(vcpu) == 0xFFFF07F0
    assert not debug.write_dr6(vcpu, 1 << 32)
    vcpu.ioctl(ioctls.KVM_SET_CPUID2, leaf7(ebx=1 << 11))
    assert debug.write_dr6(vcpu, 0)
    assert dr6(vcpu) == 0xFFFE0FF0


def test_t_b_3_bus_lock_at_cpl_3_raises_db_in_the_guest_without_an_exit(make):
    vcpu = make(exits=False, stops=[BusLock(cpl=3), Hlt(after_ns=9)])
    set_msrs(vcpu, (DEBUGCTL, 4))
    vcpu.kvm_run(0)
    assert vcpu.resume(0) == InGuest(9)
    assert (dr6(vcpu), vcpu.debug.delivered) == (0xFFFF07F0, 1)


def test_t_b_3_bus_lock_at_cpl_0_never_raises_db(make):
    vcpu = make(exits=False, stops=[BusLock(cpl=0)])
    set_msrs(vcpu, (DEBUGCTL, 4))
    run_to_exit(vcpu)
    assert (dr6(vcpu), vcpu.debug.delivered) == (0xFFFF0FF0, 0)


def test_t_b_3_bus_lock_without_the_enable_bit_never_raises_db(make):
    vcpu = make(exits=False, stops=[BusLock(cpl=3)])
    set_msrs(vcpu, (DEBUGCTL, 0))
    run_to_exit(vcpu)
    assert vcpu.debug.delivered == 0


def guest_debug(vcpu, control):
    return vcpu.ioctl(ioctls.KVM_SET_GUEST_DEBUG, KVM_GUEST_DEBUG.pack(control=control))


@pytest.mark.parametrize("control", [0x1 | 0x2, 0x1 | 0x20000])
def test_t_b_4_debugger_takes_the_db_and_cannot_see_its_cause(make, control):
    vcpu = make(exits=False, stops=[BusLock(cpl=3, insn_len=4)])
    set_msrs(vcpu, (DEBUGCTL, 4))
    guest_debug(vcpu, control)
    assert run_to_exit(vcpu) == Exit.DEBUG
    assert (vcpu.run.u32[8], vcpu.run.u64[5], vcpu.run.u64[6]) == (1, 0xFFF4, 0xFFFF0FF0)
    assert (dr6(vcpu), vcpu.debug.delivered) == (0xFFFF0FF0, 0)


def test_t_b_4_cause_shows_without_the_quirk(make):
    toml = BOTH + "[quirks]\ndebug_exit_hides_bus_lock = false\n"
    vcpu = make(toml, exits=False, stops=[BusLock(cpl=3)])
    set_msrs(vcpu, (DEBUGCTL, 4))
    guest_debug(vcpu, 0x3)
    run_to_exit(vcpu)
    assert vcpu.run.u64[6] == 0xFFFF07F0


@pytest.mark.parametrize("control", [0x1 | 0x10000, 0x2])
def test_t_b_4_software_breakpoints_or_no_debugger_do_not_divert_db(make, control):
    vcpu = make(exits=False, stops=[BusLock(cpl=3)])
    set_msrs(vcpu, (DEBUGCTL, 4))
    guest_debug(vcpu, control)
    assert run_to_exit(vcpu) == Exit.HLT
    assert vcpu.debug.delivered == 1


def test_t_b_5_exit_comes_first_and_db_with_the_next_run(make):
    vcpu = make(stops=[BusLock(cpl=3, insn_len=4)])
    set_msrs(vcpu, (DEBUGCTL, 4))
    assert run_to_exit(vcpu) == Exit.X86_BUS_LOCK
    assert (vcpu.rip, vcpu.debug.dr6, vcpu.debug.delivered) == (0xFFF4, 0xFFFF0FF0, 0)
    run_to_exit(vcpu)
    assert (dr6(vcpu), vcpu.debug.delivered) == (0xFFFF07F0, 1)


def test_t_b_5_at_cpl_0_there_is_the_exit_only(make):
    vcpu = make(stops=[BusLock(cpl=0)])
    set_msrs(vcpu, (DEBUGCTL, 4))
    assert run_to_exit(vcpu) == Exit.X86_BUS_LOCK
    run_to_exit(vcpu)
    assert vcpu.debug.delivered == 0


def test_delivery_clears_general_detect(make):
    vcpu = make(exits=False, stops=[BusLock(cpl=3)])
    set_msrs(vcpu, (DEBUGCTL, 4))
    regs = KVM_DEBUGREGS.pack(dr6=0xFFFF0FF0, dr7=0x2400)
    vcpu.ioctl(ioctls.KVM_SET_DEBUGREGS, regs)
    run_to_exit(vcpu)
    assert vcpu.debug.dr7 == 0x400


def test_debug_registers_are_kept_as_given(make):
    vcpu = make(exposed=False)
    regs = KVM_DEBUGREGS.pack(db=0x1234, dr6=0xFFFF07F0, dr7=0x500)
    KVM_DEBUGREGS.put(regs, "db", 99, index=3)
    vcpu.ioctl(ioctls.KVM_SET_DEBUGREGS, regs)
    data = bytearray(128)
    vcpu.ioctl(ioctls.KVM_GET_DEBUGREGS, data)
    assert data == regs


@pytest.mark.parametrize("values", [{"flags": 1}, {"dr6": 1 << 32}, {"dr7": 1 << 40}])
def test_debug_registers_too_wide_are_einval(make, values):
    with pytest.raises(KvmError) as error:
        make().ioctl(ioctls.KVM_SET_DEBUGREGS, KVM_DEBUGREGS.pack(**values))
    assert error.value.errno == EINVAL


def test_second_injection_while_one_is_pending_is_ebusy(make):
    vcpu = make()
    assert guest_debug(vcpu, 0x1 | 0x40000) == 0
    with pytest.raises(KvmError) as error:
        guest_debug(vcpu, 0x1 | 0x80000)
    assert error.value.errno == EBUSY
    run_to_exit(vcpu)
    assert guest_debug(vcpu, 0x1 | 0x40000) == 0


def test_init_resets_the_registers_and_leaves_the_debugger(make):
    vcpu = make()
    set_msrs(vcpu, (DEBUGCTL, 4))
    guest_debug(vcpu, 0x3)
    vcpu.init()
    assert (debugctl(vcpu), vcpu.debug.control) == (0, 0x3)
