"""Bus lock exits of real code: the acceptance tests of kvm.md A.8."""

import pytest

from kvmsim.abi.exits import Exit
from kvmsim.kvm import msrs, sregs
from kvmsim.kvm.vm import KvmEnableCap

pytest.importorskip("unicorn")

CODE, DATA, TABLES = 0x1000, 0x8000, 0x10000
HLT = "f4"
INC = "f0 ff 07"  # lock inc dword [rdi]
LOOP = (INC, "ff c9", "75 f9", HLT)  # lock inc; dec ecx; jnz
OFF, EXIT = 1, 2
PAT, MTRR_DEFAULT = 0x277, 0x2FF
INTEL = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\n'
AMD = 'vendor = "amd"\n[bus-lock]\nexit = "fault"\n'
INCAPABLE = 'vendor = "intel"\n'
BOTH = pytest.mark.parametrize("preset", [INTEL, AMD], ids=["intel", "amd"])


def detection(guest, mode):
    guest.vm.enable_cap(KvmEnableCap(cap=193, args=(mode, 0, 0, 0)))


def exits(guest):
    """Reasons up to the HLT."""
    reasons = []
    while (reason := guest.run()) != Exit.HLT:
        reasons.append(reason)
        assert len(reasons) < 1000
    return reasons


@pytest.mark.parametrize(
    ("preset", "rip", "first"), [(INTEL, CODE + 3, 1), (AMD, CODE, 0)], ids=["intel", "amd"]
)
def test_t_a_2_a_hundred_split_increments_are_a_hundred_exits(start, preset, rip, first):
    guest = start(preset, *LOOP)
    guest.set_regs(rcx=100)
    seen = []
    while guest.run() == Exit.X86_BUS_LOCK:
        value = guest.word_at(DATA + 62, 4)
        seen.append((guest.regs("rip"), value, guest.vcpu.run.flags))
    assert seen == [(rip, value, 2) for value in range(first, first + 100)]
    assert guest.word_at(DATA + 62, 4) == 100


@BOTH
def test_t_a_3_aligned_increments_are_no_exits(start, preset):
    guest = start(preset, *LOOP)
    guest.set_regs(rcx=100, rdi=DATA + 60)
    assert exits(guest) == []
    assert (guest.word_at(DATA + 60, 4), guest.vcpu.bus_locks) == (100, 0)


@BOTH
@pytest.mark.parametrize("bits", [0x10, 0x18, 0x08, 0x88], ids=["uc-", "uc", "wt", "wp"])
def test_t_a_4_an_aligned_lock_on_memory_that_is_not_write_back_is_one_exit(start, preset, bits):
    guest = start(preset, INC, HLT)
    guest.word(TABLES + 3 * 4096 + 8 * 8, DATA | 7 | bits)
    if bits == 0x88:
        assert msrs.write(guest.vcpu, PAT, 0x0007040500070406, 0)  # WP where PAT and PWT say
    guest.set_regs(rdi=DATA)
    assert exits(guest) == [Exit.X86_BUS_LOCK]
    assert guest.word_at(DATA, 4) == 1


@BOTH
def test_t_a_4_the_ranges_of_the_mtrrs_count_too(start, preset):
    guest = start(preset, INC, INC, HLT)
    assert msrs.write(guest.vcpu, MTRR_DEFAULT, 0x800, 0)  # on, uncacheable
    guest.set_regs(rdi=DATA)
    assert exits(guest) == [Exit.X86_BUS_LOCK] * 2


@BOTH
@pytest.mark.parametrize(
    ("code", "locks"),
    [
        ("87 07", 1),  # xchg [rdi], eax
        ("89 07", 0),  # mov [rdi], eax
        ("8b 07", 0),
        ("ff 07", 0),  # inc dword [rdi]
        ("f0 0f c1 07", 1),  # lock xadd
        ("f0 0f b1 07", 1),  # lock cmpxchg, and it fails
        ("f0 0f ab 0f", 1),  # lock bts [rdi], ecx
        ("f0 48 0f c7 0f", 0),  # lock cmpxchg16b: #GP, no lock
        ("f0 0f c7 0f", 1),  # lock cmpxchg8b
    ],
)
def test_t_a_5_which_split_accesses_lock(start, preset, code, locks):
    guest = start(preset, code, HLT).gate(13, HLT)
    guest.set_regs(rax=5)
    assert exits(guest) == [Exit.X86_BUS_LOCK] * locks
    assert guest.vcpu.bus_locks == locks


def test_t_a_6_the_flag_rides_on_an_mmio_exit_and_goes_with_the_next_run(start):
    guest = start(INTEL, INC, HLT)
    guest.word(TABLES + 3 * 4096 + 8 * 8, 0xFED00007)
    assert guest.run() == Exit.MMIO
    assert guest.vcpu.run.flags == 2
    while guest.run() == Exit.MMIO:
        assert guest.vcpu.run.flags == 0
    assert guest.vcpu.run.exit_reason == Exit.HLT
    assert guest.vcpu.run.flags == 0


def test_t_a_7_enabled_behind_the_vcpu_it_waits_for_cpuid_on_intel(start):
    guest = start(INTEL, INC, INC, HLT, exits=False)
    detection(guest, EXIT)
    assert not guest.vcpu.bus_lock_exit
    guest.offer_everything()
    assert exits(guest) == [Exit.X86_BUS_LOCK] * 2


def test_t_a_7_a_vcpu_that_has_run_never_picks_it_up_on_intel(start):
    guest = start(INTEL, HLT, INC, HLT, exits=False).offer_everything()
    assert guest.run() == Exit.HLT
    detection(guest, EXIT)
    guest.offer_everything()
    assert exits(guest) == []
    assert guest.vcpu.bus_locks == 1


def test_t_a_7_enabled_behind_the_vcpu_it_waits_for_init_on_amd(start):
    guest = start(AMD, INC, HLT, exits=False)
    detection(guest, EXIT)
    guest.offer_everything()
    assert not guest.vcpu.bus_lock_exit
    guest.vcpu.init()
    assert guest.vcpu.bus_lock_exit


@BOTH
def test_t_a_8_off_behind_exit_leaves_it_on(start, preset):
    guest = start(preset, INC, HLT)
    detection(guest, OFF)
    guest.offer_everything()
    assert exits(guest) == [Exit.X86_BUS_LOCK]


def test_t_a_9_skipped_by_user_space_the_lock_does_not_happen(start):
    guest = start(AMD, INC, INC, HLT)
    assert guest.run() == Exit.X86_BUS_LOCK
    guest.set_regs(rip=CODE + 3)
    assert guest.run() == Exit.X86_BUS_LOCK
    assert (guest.regs("rip"), guest.word_at(DATA + 62, 4)) == (CODE + 3, 0)
    assert guest.run() == Exit.HLT
    assert guest.word_at(DATA + 62, 4) == 1


def test_t_a_10_a_host_without_the_mechanism_takes_the_lock_in_silence(start):
    guest = start(INCAPABLE, INC, HLT)
    assert exits(guest) == []
    assert (guest.vcpu.bus_locks, guest.vcpu.run.flags) == (1, 0)


@BOTH
def test_t_a_11_each_vcpu_has_flags_of_its_own(start, preset):
    from kvmsim.kvm.x86.guest import Emulated

    guest = start(preset, INC, HLT)
    other = guest.vm.create_vcpu(1)
    Emulated(guest.engine, guest.engine.policy).enter(other)
    sregs.of(other).data[:] = sregs.of(guest.vcpu).data
    other.set_regs(guest.vcpu.get_regs())
    guest.set_regs(rdi=DATA)
    assert guest.run() == Exit.HLT
    blocked = other.kvm_run(0)
    while blocked is not None:
        blocked = other.resume(0)
    assert other.run.exit_reason == Exit.X86_BUS_LOCK
    assert (guest.vcpu.run.flags, other.run.flags) == (0, 2)
    assert (guest.vcpu.bus_locks, other.exits[Exit.X86_BUS_LOCK]) == (0, 1)
