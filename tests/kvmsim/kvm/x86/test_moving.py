"""A guest that is moved to another VM at any of its exits goes on as if nothing had happened.

Moved as a VMM does it: pending I/O is completed by a KVM_RUN that does not enter, everything is got
by ioctls, set in a fresh VM with a copy of the memory, and that one runs from there on.
"""

from errno import EINTR
from itertools import zip_longest

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmsim.abi import ioctls
from kvmsim.abi.exits import Exit
from kvmsim.abi.irq import KVM_MSI
from kvmsim.abi.structs import KVM_MSR_ENTRY, KVM_MSRS
from kvmsim.errors import KvmError
from kvmsim.kvm import msrs

pytest.importorskip("unicorn")

INTEL = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n'
AMD = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n'
RAM, TABLES, ROUNDS = 0x40000, 0x13000, 3
IRQ = 0x40
MAIN = (
    "db e3",  # fninit
    "d9 ee",  # fldz
    "b9 81 00 00 c0",  # mov ecx,0xc0000081
    "31 c0",  # xor eax,eax
    "ba 08 00 08 00",  # mov edx,0x80008
    "0f 30",  # wrmsr
    "b9 82 00 00 c0",  # mov ecx,0xc0000082
    "b8 23 11 00 00",  # mov eax,0x1123
    "31 d2",  # xor edx,edx
    "0f 30",  # wrmsr
    "b9 84 00 00 c0",  # mov ecx,0xc0000084
    "b8 00 06 00 00",  # mov eax,0x600
    "0f 30",  # wrmsr
    "49 01 d8",  # add r8,rbx
    "4d 11 c1",  # adc r9,r8
    "49 c1 c1 07",  # rol r9,0x7
    "f2 48 0f 2a c3",  # cvtsi2sd xmm0,rbx
    "f2 0f 58 c8",  # addsd xmm1,xmm0
    "f2 0f 59 c8",  # mulsd xmm1,xmm0
    "66 0f d4 d1",  # paddq xmm2,xmm1
    "f3 0f 7f 14 25 00 81 00 00",  # movdqu xmmword 0x8100,xmm2
    "df 2c 25 00 81 00 00",  # fild qword 0x8100
    "de c1",  # faddp st(1),st
    "89 d8",  # mov eax,ebx
    "83 e0 03",  # and eax,0x3
    "c1 e0 0d",  # shl eax,0xd
    "0d 80 1f 00 00",  # or eax,0x1f80
    "89 04 25 10 81 00 00",  # mov dword 0x8110,eax
    "0f ae 14 25 10 81 00 00",  # ldmxcsr dword 0x8110
    "e6 10",  # out 0x10,al
    "e5 11",  # in eax,0x11
    "49 11 c2",  # adc r10,rax
    "b9 02 01 00 c0",  # mov ecx,0xc0000102
    "44 89 d0",  # mov eax,r10d
    "31 d2",  # xor edx,edx
    "0f 30",  # wrmsr
    "0f 01 f8",  # swapgs
    "b9 01 01 00 c0",  # mov ecx,0xc0000101
    "0f 32",  # rdmsr
    "49 01 c3",  # add r11,rax
    "b9 77 02 00 00",  # mov ecx,0x277
    "b8 06 04 07 00",  # mov eax,0x70406
    "ba 06 04 07 00",  # mov edx,0x70406
    "0f 30",  # wrmsr
    "83 04 25 08 00 10 00 05",  # add dword 0x100008,0x5
    "48 c7 c6 00 81 00 00",  # mov rsi,0x8100
    "b9 03 00 00 00",  # mov ecx,0x3
    "ba 13 00 00 00",  # mov edx,0x13
    "fd",  # std
    "f3 6e",  # rep outs dx,byte [rsi]
    "fc",  # cld
    "48 c7 c7 20 81 00 00",  # mov rdi,0x8120
    "b9 03 00 00 00",  # mov ecx,0x3
    "f3 6c",  # rep ins byte es:[rdi],dx
    "0f 0b",  # ud2
    "48 89 04 25 10 f0 1f 00",  # mov qword 0x1ff010,rax
    "f0 83 04 25 3e 80 00 00 03",  # lock add dword 0x803e,0x3
    "fb",  # sti
    "e6 14",  # out 0x14,al
    "90",  # nop
    "fa",  # cli
    "4c 89 c8",  # mov rax,r9
    "0f 23 c8",  # mov dr1,rax
    "8b 04 25 3e 80 00 00",  # mov eax,dword 0x803e
    "49 0f ab c6",  # bts r14,rax
    "6a 23",  # push 0x23
    "68 00 70 00 00",  # push 0x7000
    "68 02 32 00 00",  # push 0x3202
    "6a 1b",  # push 0x1b
    "48 c7 c0 12 11 00 00",  # mov rax,0x1112
    "50",  # push rax
    "48 cf",  # iretq
    "f0 83 04 25 3e 80 00 00 01",  # lock add dword 0x803e,0x1
    "41 50",  # push r8
    "41 5f",  # pop r15
    "e6 15",  # out 0x15,al
    "0f 05",  # syscall
    "48 c7 c4 00 60 00 00",  # mov rsp,0x6000
    "dd 14 25 30 81 00 00",  # fst qword 0x8130
    "fb",  # sti
    "f4",  # hlt
    "fa",  # cli
    "48 ff cb",  # dec rbx
    "0f 85 ef fe ff ff",  # jne 2c
    "0f ae 1c 25 40 81 00 00",  # stmxcsr dword 0x8140
    "db 3c 25 50 81 00 00",  # fstp tbyte 0x8150
    "fa",  # cli
    "f4",  # hlt
    "eb fd",  # jmp 14d
)
UD = (
    "49 ff c4",  # inc r12
    "48 83 04 24 02",  # add qword [rsp],0x2
    "48 cf",  # iretq
)
PF = (
    "41 0f 20 d5",  # mov r13,cr2
    "4c 03 2c 24",  # add r13,qword [rsp]
    "48 83 c4 08",  # add rsp,0x8
    "48 83 04 24 08",  # add qword [rsp],0x8
    "48 cf",  # iretq
)
IRQ_HANDLER = (
    "48 ff c5",  # inc rbp
    "e6 16",  # out 0x16,al
    "48 cf",  # iretq
)

#: What is saved, each by its getter, in the order in which it is set.
STATE = (
    (ioctls.KVM_GET_SREGS, ioctls.KVM_SET_SREGS, 312),
    (ioctls.KVM_GET_XCRS, ioctls.KVM_SET_XCRS, 392),
    (ioctls.KVM_GET_XSAVE, ioctls.KVM_SET_XSAVE, 4096),
    (ioctls.KVM_GET_VCPU_EVENTS, ioctls.KVM_SET_VCPU_EVENTS, 64),
    (ioctls.KVM_GET_MP_STATE, ioctls.KVM_SET_MP_STATE, 4),
    (ioctls.KVM_GET_DEBUGREGS, ioctls.KVM_SET_DEBUGREGS, 128),
    (ioctls.KVM_GET_REGS, ioctls.KVM_SET_REGS, 144),
)
MTRRS = (0x2FF, 0x200, 0x201, 0x250)
#: Asynchronous page faults: not without a local APIC in the kernel.
NOT_THERE = {0x4B564D02, 0x4B564D06, 0x4B564D07}


def prepare(guest):
    guest.offer_everything()
    guest.gate(6, *UD, at=0x2000).gate(14, *PF, at=0x2100).gate(IRQ, *IRQ_HANDLER, at=0x2200)
    guest.word(TABLES + 0x1FF * 8, 0)
    guest.set_regs(rbx=ROUNDS)
    return guest


def msr_table(guest):
    listed = [*set(msrs.saved(guest.vm.machine)) - NOT_THERE, *MTRRS]
    entries = b"".join(bytes(KVM_MSR_ENTRY.pack(index=index)) for index in listed)
    return bytearray(KVM_MSRS.pack(nmsrs=len(listed)) + entries), len(listed)


def complete(guest):
    """End the instruction of the last exit. False: it has more to say, and the page says it."""
    guest.vcpu.run.immediate_exit = 1
    try:
        return guest.vcpu.kvm_run(0) is not None
    except KvmError as error:
        assert error.errno == EINTR
        return True
    finally:
        guest.vcpu.run.immediate_exit = 0


def moved(guest, fresh, *more):
    """The same guest in another VM."""
    fresh.ram[:] = bytes(guest.ram)
    saved = []
    for getter, _setter, size_bytes in (*STATE, *more):
        saved.append(bytearray(size_bytes))
        guest.vcpu.ioctl(getter, saved[-1])
    table, count = msr_table(guest)
    assert guest.vcpu.ioctl(ioctls.KVM_GET_MSRS, table) == count
    fresh.offer_everything()
    for data, (_getter, setter, _size) in zip(saved, (*STATE, *more), strict=True):
        fresh.vcpu.ioctl(setter, data)
        if setter == ioctls.KVM_SET_SREGS:
            assert fresh.vcpu.ioctl(ioctls.KVM_SET_MSRS, table) == count
    return fresh


def seen(guest):
    """What user space sees of the last exit."""
    page = guest.vcpu.run
    reason = page.exit_reason
    data = ()
    if reason == Exit.IO:
        direction, *_rest = page.io
        data = (page.io, page.io_data() if direction else b"")
    elif reason == Exit.MMIO:
        data = page.mmio if page.mmio[2] else page.mmio[::2]
    shown = ("rip", "rsp", "rflags", "rax", "rbx", "rcx", "rbp", "r9", "r11", "r12", "r13", "r15")
    return (reason, page.if_flag, data, *(guest.regs(name) for name in shown))


def answer(guest, number):
    """User space's part: what is read is the number of the exit."""
    page = guest.vcpu.run
    if page.exit_reason == Exit.IO and not page.io[0]:
        size_bytes = page.io[1] * page.io[3]
        page.io_data((number + 1).to_bytes(size_bytes, "little"))
    elif page.exit_reason == Exit.MMIO and not page.mmio[2]:
        page.answer_mmio((number * 3).to_bytes(8, "little"))
    # Some arrive while the guest does not take interrupts.
    if number % 5 == 4 and not guest.vm.irqchip and not guest.vcpu.run.if_flag:
        guest.vcpu.ioctl(ioctls.KVM_INTERRUPT, bytearray(IRQ.to_bytes(4, "little")))


def play(make, moves):
    """Run to the end; every exit, and the memory it leaves."""
    guest = prepare(make())
    trace = []
    while not trace or trace[-1][0] != Exit.HLT or guest.regs("rbx"):
        reason = guest.run()
        assert reason in {Exit.IO, Exit.MMIO, Exit.HLT, Exit.X86_BUS_LOCK}, reason
        while True:
            number = len(trace)
            trace.append(seen(guest))
            answer(guest, number)
            if number not in moves or (trace[-1][0] == Exit.X86_BUS_LOCK and guest.vcpu.fault_like):
                # A bus lock not taken yet would be reported again over there, on Linux too.
                break
            over = complete(guest)
            if over:
                guest = moved(guest, make())
                break
        assert len(trace) < 1000
    return trace, bytes(guest.ram)


def difference(one, other):
    """The first exit at which two runs differ, or where their memory does; None: nowhere."""
    for number, pair in enumerate(zip_longest(one[0], other[0])):
        if pair[0] != pair[1]:
            return number, *pair
    places = (at for at in range(RAM) if one[1][at] != other[1][at])
    return next(places, None)


@pytest.fixture(params=[INTEL, AMD], ids=["intel", "amd"])
def make(start, request):
    return lambda: start(request.param, *MAIN)


def test_guest_says_the_same_twice(make):
    assert difference(play(make, ()), play(make, ())) is None


@pytest.mark.parametrize("step", [1, 2, 3])
def test_guest_moved_at_every_exit_goes_on_as_if_it_had_not(make, step):
    assert difference(play(make, range(0, 1000, step)), play(make, ())) is None


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(moves=st.sets(st.integers(0, 90), min_size=1, max_size=8))
def test_guest_moved_at_some_exits_goes_on_as_if_it_had_not(make, moves):
    assert difference(play(make, moves), play(make, ())) is None


# -- with interrupt controllers in the kernel ------------------------------------------------------

APIC = 0xFEE00000
APIC_MAIN = (
    "c7 04 25 f0 00 10 00 ff 01 00 00",  # mov dword [0x1000f0],0x1ff: enable the APIC
    "e6 10",  # out 0x10,al
    "fb",  # sti
    "90",  # nop
    "e6 11",  # out 0x11,al
    "fa",  # cli
    "8b 04 25 a0 00 10 00",  # mov eax,[0x1000a0]: the priority
    "49 01 c0",  # add r8,rax
    "e5 12",  # in eax,0x12
    "ff cb",  # dec ebx
    "75 e9",  # jne back to the first out
    "e6 fe",  # out 0xfe,al
)
APIC_HANDLER = (
    "48 ff c5",  # inc rbp
    "e6 13",  # out 0x13,al
    "c7 04 25 b0 00 10 00 00 00 00 00",  # mov dword [0x1000b0],0: end of interrupt
    "48 cf",  # iretq
)
LAPIC = (ioctls.KVM_GET_LAPIC, ioctls.KVM_SET_LAPIC, 1024)


def signal(guest, vector):
    data = KVM_MSI.pack(address_lo=APIC, data=vector)
    guest.vm.ioctl(ioctls.KVM_SIGNAL_MSI, data)


def play_apic(make, moves):
    """Run to the end: messages arrive at exits, some while others are handled."""
    guest = make()
    trace = []
    while not trace or trace[-1][2][0][2] != 0xFE:
        assert guest.run() == Exit.IO
        number = len(trace)
        trace.append(seen(guest))
        answer(guest, number)
        if number % 3 == 1:
            signal(guest, IRQ + 0x10 * (number % 2))
        if number in moves:
            assert complete(guest)
            guest = moved(guest, make(), LAPIC)
        assert len(trace) < 1000
    return trace, bytes(guest.ram)


@pytest.fixture
def make_apic(start):
    def begin():
        guest = start(INTEL, *APIC_MAIN, irqchip=True).offer_everything()
        guest.gate(IRQ, *APIC_HANDLER, at=0x2200).gate(IRQ + 0x10, *APIC_HANDLER, at=0x2200)
        guest.word(TABLES + 0x100 * 8, APIC | 0x1F)
        guest.set_regs(rbx=20)
        return guest

    return begin


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_guest_with_an_apic_in_the_kernel_is_moved_with_its_interrupts(make_apic, step):
    stayed = play_apic(make_apic, ())
    assert difference(play_apic(make_apic, range(0, 1000, step)), stayed) is None
    assert stayed[0][-1][9] > 5  # interrupts were handled
