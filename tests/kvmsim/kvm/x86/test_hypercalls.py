import pytest

from kvmsim.abi.exits import Exit
from kvmsim.abi.run import EXIT_HYPERCALL, EXIT_SYSTEM_EVENT
from kvmsim.kvm import cpuid, protected
from kvmsim.kvm.vm import KvmEnableCap

pytest.importorskip("unicorn")

INTEL, AMD = 'vendor = "intel"\n', 'vendor = "amd"\n'
SEV = 'vendor = "amd"\n[sev]\nmax-asid = 9\nmin-sev-asid = 5\n'
HLT = "f4"
VMCALL, VMMCALL, VMGEXIT = "0f 01 c1", "0f 01 d9", "f3 0f 01 d9"
SCHED_YIELD, SEND_IPI, CLOCK_PAIRING, MAP_GPA_RANGE = 11, 10, 9, 12
CODE = 0x1000
U64 = (1 << 64) - 1


def call(number, insn):
    return "b8" + number.to_bytes(4, "little").hex() + insn


@pytest.mark.parametrize(("preset", "insn"), [(INTEL, VMCALL), (AMD, VMMCALL)])
@pytest.mark.parametrize(
    ("number", "result"), [(SCHED_YIELD, 0), (CLOCK_PAIRING, -95), (999, -1000)]
)
def test_result_of_a_hypercall(start, preset, insn, number, result):
    guest = start(preset, call(number, insn), HLT).offer_everything()
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == result & U64


def test_ring_3_has_no_hypercalls(start):
    guest = start(INTEL, call(SCHED_YIELD, VMCALL), "0f 0b", ring=3).offer_everything()
    guest.gate(6, HLT)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == -1 & U64


@pytest.mark.parametrize(
    ("preset", "insn", "right"), [(INTEL, VMMCALL, VMCALL), (AMD, VMCALL, VMMCALL)]
)
def test_instruction_of_the_other_vendor_is_put_right_in_place(start, preset, insn, right):
    guest = start(preset, call(SCHED_YIELD, insn), HLT).offer_everything()
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 0
    assert guest.ram[CODE + 5 : CODE + 8] == bytes.fromhex(right)


def test_with_the_quirk_off_it_does_not_exist(start):
    guest = start(AMD, call(SCHED_YIELD, VMCALL), HLT).offer_everything()
    guest.gate(6, "b3 06", HLT)
    guest.vm.enable_cap(KvmEnableCap(cap=213, args=(1 << 5, 0, 0, 0)))
    assert guest.run() == Exit.HLT
    assert guest.regs("rbx") == 6
    assert guest.ram[CODE + 5 : CODE + 8] == bytes.fromhex(VMCALL)


def test_hypercall_an_enforced_cpuid_does_not_show(start):
    guest = start(AMD, call(SCHED_YIELD, VMMCALL), HLT)
    guest.vcpu.enforces_pv_cpuid = True
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == -1000 & U64


def test_user_space_carries_out_a_change_of_pages(start):
    guest = start(AMD, call(MAP_GPA_RANGE, VMMCALL), HLT)
    features = cpuid.Entry(0x40000001, eax=1 << 16)
    cpuid.set_table(guest.vcpu, features.pack())
    guest.vm.enable_cap(KvmEnableCap(cap=201, args=(1 << MAP_GPA_RANGE, 0, 0, 0)))
    guest.set_regs(rbx=0x5000, rcx=2, rdx=0x10)
    assert guest.run() == Exit.HYPERCALL
    memory = bytes(guest.vcpu.run.memory[:128])
    assert EXIT_HYPERCALL.get(memory, "nr") == MAP_GPA_RANGE
    assert [EXIT_HYPERCALL.get(memory, "args", at) for at in range(3)] == [0x5000, 2, 0x10]
    guest.vcpu.run.memory[88:96] = (77).to_bytes(8, "little")
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") == 77


# -- encrypted guests ------------------------------------------------------------------------------


def msr(index, insn):
    return "b9" + index.to_bytes(4, "little").hex() + insn


@pytest.fixture
def encrypted(start):
    """A guest that believes it is one: what it asks of KVM is all there is here."""

    def make(*code, es=True):
        guest = start(SEV, *code, HLT, exits=False).offer_everything().gate(13, "b3 0d", HLT)
        guest.vm.sev_active, guest.vm.es_active, guest.vm.ghcb_version = False, es, 2
        return guest

    return make


def test_guest_that_is_not_encrypted_has_no_status(encrypted):
    guest = encrypted(msr(0xC0010131, "0f 32"))
    assert guest.run() == Exit.HLT
    assert guest.regs("rbx") == 0xD


def test_termination_is_a_system_event(encrypted):
    guest = encrypted("b8 00 01 00 00", "31 d2", msr(0xC0010130, "0f 30"), VMGEXIT)
    protected.protect(guest.vcpu)
    assert guest.run() == Exit.SYSTEM_EVENT
    memory = bytes(guest.vcpu.run.memory[:64])
    shown = [EXIT_SYSTEM_EVENT.get(memory, name) for name in ("type", "ndata", "data")]
    assert shown == [6, 1, 0x100]


def test_request_for_information_is_answered_in_the_register(encrypted):
    guest = encrypted(
        "b8 02 00 00 00", "31 d2", msr(0xC0010130, "0f 30"), VMGEXIT, msr(0xC0010130, "0f 32")
    )
    protected.protect(guest.vcpu)
    assert guest.run() == Exit.HLT
    assert guest.regs("rax") & 0xFFF == 1
    assert guest.regs("rdx") == 2 << 16 | 1
