"""A guest that turns its last-branch records on and reads them back by RDMSR."""

import pytest

from kvmsim.abi.exits import Exit
from kvmsim.kvm import lbr, msrs
from kvmsim.kvm.lbr import State

pytest.importorskip("unicorn")

CODE, HANDLER = 0x1000, 0x2000
HLT = "f4"
ICE_LAKE = 'vendor = "intel"\nfamily = 6\nmodel = 106\n[pmu]\n'
DEBUGCTL, SELECT, TOS, FROM, TO = 0x1D9, 0x1C8, 0x1C9, 0x680, 0x6C0


def wrmsr(index, value):
    """Code: mov ecx, index; mov eax, value; xor edx, edx; wrmsr."""
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


#: Behind ON: where RAX and RDX lead is loaded first.
BODY = START + 14
KINDS = (
    f"48 c7 c0 {(BODY + 11).to_bytes(4, 'little').hex()}",  # mov rax, the second RET
    f"48 c7 c2 {(BODY + 22).to_bytes(4, 'little').hex()}",  # mov rdx, the SYSCALL
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
    "0f 05",  # 22: syscall, to 24
    OFF,
    HLT,
)
CONDITIONAL, CALL, INDIRECT_CALL, RETURN, INDIRECT_JUMP, JUMP, FAR = range(2, 9)
TAKEN = (
    (CALL, 0, 10),
    (RETURN, 10, 5),
    (INDIRECT_CALL, 5, 11),
    (RETURN, 11, 8),
    (JUMP, 8, 13),
    (CONDITIONAL, 17, 20),
    (INDIRECT_JUMP, 20, 22),
    (FAR, 22, 24),
)


def all_kinds(begin, select):
    guest = begin(ON, *KINDS)
    assert msrs.write(guest.vcpu, 0xC0000081, 8 << 32, 0)  # STAR
    assert msrs.write(guest.vcpu, 0xC0000082, BODY + 24, 0)  # LSTAR
    assert msrs.write(guest.vcpu, SELECT, select, 0)
    assert guest.run() == Exit.HLT
    return [(source - BODY, target - BODY) for source, target in records(guest)]


def test_t_e_2_every_kind_of_branch_is_recorded_at_its_place(begin):
    assert all_kinds(begin, 0) == [(source, target) for _, source, target in TAKEN]


@pytest.mark.parametrize("hidden", range(2, 9))
def test_t_e_2_each_bit_of_the_filter_hides_one_kind(begin, hidden):
    shown = [(source, target) for kind, source, target in TAKEN if kind != hidden]
    assert all_kinds(begin, 1 << hidden) == shown


@pytest.mark.parametrize(("select", "shown"), [(1, 0), (2, len(TAKEN))])
def test_t_e_2_the_filter_of_ring_0_hides_all_of_ring_0(begin, select, shown):
    assert len(all_kinds(begin, select)) == shown


def test_t_e_2_call_stack_mode_leaves_the_calls_that_are_open(begin):
    guest = begin(wrmsr(SELECT, 1 << 9), ON, "e8 01 00 00 00", HLT, "e8 01 00 00 00", "90")
    first = START + WRMSR_BYTES
    inner = first + 6 + 6
    # The inner routine calls and returns once, then stops recording.
    guest.put(inner, "e8 0f 00 00 00", OFF, HLT)
    guest.put(inner + 5 + 15, "c3")
    assert guest.run() == Exit.HLT
    tos = lbr.of(guest.vcpu).records.tos
    newest = list(lbr.of(guest.vcpu).records.newest())[:tos]
    assert newest == [(first + 6, inner), (first, first + 6)]


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
