"""A guest that turns its last-branch records on and reads them back by RDMSR."""

import pytest

from kvmsim.abi.exits import Exit
from kvmsim.kvm import lbr, msrs
from kvmsim.kvm.lbr import State

pytest.importorskip("unicorn")

CODE, DATA, HANDLER = 0x1000, 0x8000, 0x2000
HLT = "f4"
ICE_LAKE = 'vendor = "intel"\nfamily = 6\nmodel = 106\n[pmu]\n'
DEBUGCTL, SELECT, TOS, FROM, TO = 0x1D9, 0x1C8, 0x1C9, 0x680, 0x6C0


def wrmsr(index, value):
    """27 bytes... of code: mov ecx, index; mov eax, value; xor edx, edx; wrmsr."""
    low = index.to_bytes(4, "little").hex(), value.to_bytes(4, "little").hex()
    return f"b9 {low[0]} b8 {low[1]} 31 d2 0f 30"


def rdmsr(index):
    return f"b9 {index.to_bytes(4, 'little').hex()} 0f 32"


ON, OFF = wrmsr(DEBUGCTL, 1), wrmsr(DEBUGCTL, 0)
WRMSR_BYTES = len(bytes.fromhex(ON))
START = CODE + WRMSR_BYTES


def records(guest):
    """(from, to) of all records, the oldest first."""
    return [pair for pair in lbr.of(guest.vcpu).records.newest() if pair[0]][::-1]


@pytest.fixture
def begin(start):
    def begin(*code, preset=ICE_LAKE, ring=0):
        return start(preset, *code, ring=ring, exits=False).offer_everything()

    return begin


def test_t_e_2_every_kind_of_branch_is_recorded_at_its_place(begin):
    guest = begin(
        ON,
        "e8 05 00 00 00",  # 0: call 10
        "48 ff d0",  # 5: call rax (11)
        "eb 03",  # 8: jmp 13
        "c3",  # 10: ret
        "c3",  # 11: ret
        "90",
        "31 db",  # 13: xor ebx, ebx
        "75 05",  # 15: jne, not taken
        "74 01",  # 17: je 20
        "90",
        "ff e2",  # 20: jmp rdx (22)
        "0f 05",  # 22: syscall
        OFF,
        HLT,
    )
    s = START
    # CPUID does not matter to SYSCALL here: SCE is on.
    guest.set_regs(rax=s + 11, rdx=s + 22)
    assert msrs.write(guest.vcpu, 0xC0000081, 8 << 32, 0)
    assert msrs.write(guest.vcpu, 0xC0000082, s + 24, 0)
    # ON clobbers RAX and RDX: give them back.
    fix = f"48 c7 c0 {(s + 14 + 11).to_bytes(4, 'little').hex()}"
    fix += f"48 c7 c2 {(s + 14 + 22).to_bytes(4, 'little').hex()}"
    code = bytes(guest.ram[s : s + 64])
    guest.put(s, fix)
    guest.ram[s + 14 : s + 14 + 64] = code
    assert msrs.write(guest.vcpu, 0xC0000082, s + 14 + 24, 0)
    assert guest.run() == Exit.HLT
    s += 14
    assert records(guest) == [
        (s, s + 10),
        (s + 10, s + 5),
        (s + 5, s + 11),
        (s + 11, s + 8),
        (s + 8, s + 13),
        (s + 17, s + 20),
        (s + 20, s + 22),
        (s + 22, s + 24),
    ]


def test_the_guest_reads_its_last_branches(begin):
    guest = begin(ON, "eb 00", "eb 01", "90", OFF, rdmsr(TOS), "89 c3", rdmsr(FROM + 2), HLT)
    assert guest.run() == Exit.HLT
    assert guest.regs("rbx") == 2
    assert guest.regs("rax") == START + 2


def test_t_e_3_the_last_32_of_many_are_left_and_tos_wraps(begin):
    guest = begin(ON, "b9 e8 03 00 00", "ff c9", "75 fc", OFF, HLT)
    assert guest.run() == Exit.HLT
    loop = START + 5
    assert records(guest) == [(loop + 2, loop)] * 32
    assert lbr.of(guest.vcpu).records.tos == 999 % 32


def test_the_guest_filters_by_lbr_select(begin):
    guest = begin(wrmsr(SELECT, 1 << 7), ON, "eb 00", "e8 00 00 00 00", "eb 00", OFF, HLT)
    assert guest.run() == Exit.HLT
    call = START + WRMSR_BYTES + 2
    assert records(guest) == [(call, call + 5)]


def test_records_survive_exits_to_user_space(begin):
    guest = begin(ON, "eb 00", "e6 80", "eb 00", "e6 80", "eb 00", OFF, HLT)
    assert [guest.run() for _ in range(3)] == [Exit.IO, Exit.IO, Exit.HLT]
    s = START
    assert records(guest) == [(s, s + 2), (s + 4, s + 6), (s + 8, s + 10)]


def test_an_exception_and_its_return_are_far_branches(begin):
    guest = begin(ON, "0f 0b", "90", OFF, HLT)
    guest.gate(6, "48 83 04 24 02", "48 cf")  # add qword [rsp], 2; iretq
    assert guest.run() == Exit.HLT
    assert records(guest) == [(START, HANDLER), (HANDLER + 5, START + 2)]


def test_a_branch_belongs_to_the_privilege_level_it_ends_in(begin):
    guest = begin("eb 00", "cd 80", "eb 00", "cd 81", ring=3)
    guest.gate(0x80, "eb 00", "48 cf", dpl=3).gate(0x81, HLT, at=HANDLER + 0x80, dpl=3)
    guest.set_debugctl(1)
    assert msrs.write(guest.vcpu, SELECT, 1, 0)
    assert guest.run() == Exit.HLT
    assert records(guest) == [
        (CODE, CODE + 2),
        (HANDLER + 2, CODE + 4),
        (CODE + 4, CODE + 6),
    ]


def test_without_records_reading_tos_is_a_general_protection_fault(begin):
    guest = begin(rdmsr(TOS), HLT, preset='vendor = "intel"\n').gate(13, HLT)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1


def test_t_e_4_a_guest_whose_host_takes_the_facility_reads_zero(begin):
    guest = begin(ON, "eb 00", "e6 80", rdmsr(FROM + 1), HLT)
    assert guest.run() == Exit.IO
    assert records(guest) == [(START, START + 2)]
    guest.vm.machine.lbr_facility.take()
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0
    assert lbr.of(guest.vcpu).state is State.LOST


def test_a_write_of_0x345_by_the_guest_is_a_general_protection_fault(begin):
    guest = begin(rdmsr(0x345), "e6 80", "0f 30", HLT).gate(13, HLT)
    assert guest.run() == Exit.IO
    assert guest.regs("rax") == 0x2005
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1
