"""Split locks of real code on a host whose processor raises #AC for them (kvm.md B.5)."""

import pytest

from kvmsim.abi.exits import Exit
from kvmsim.errors import KvmError
from kvmsim.kvm import msrs, sregs
from kvmsim.kvm.run import Halted, InGuest

pytest.importorskip("unicorn")

CODE, DATA, HANDLER = 0x1000, 0x8000, 0x2000
HLT = "f4"
INC = "f0 ff 07"  # lock inc dword [rdi]
AC = 17
MS = 1_000_000
HOST = 'vendor = "intel"\n[bus-lock]\nexit = "trap"\ndetect = true\nsplit-lock-detect = true\n'
WARN = HOST + '[kernel]\nsplit-lock-detect = "warn"\nhz = 250\n'
QUIET = WARN + "split-lock-mitigate = false\n"
FATAL = HOST + '[kernel]\nsplit-lock-detect = "fatal"\n'
OFF = HOST + '[kernel]\nsplit-lock-detect = "off"\n'
RATELIMIT = HOST + '[kernel]\nsplit-lock-detect = "ratelimit:5"\n'


def slept_ns(guest, now_ns):
    """Let KVM_RUN go on to its first sleep; for how long that is."""
    blocked = guest.vcpu.kvm_run(now_ns)
    while isinstance(blocked, InGuest):
        now_ns += blocked.guest_ns
        blocked = guest.vcpu.resume(now_ns)
    assert isinstance(blocked, Halted)
    return blocked.wake_after_ns, now_ns


def go_on(guest, now_ns):
    """Past a sleep that is over; the exit reason."""
    guest.vcpu.wake(now_ns)
    blocked = guest.vcpu.resume(now_ns)
    while blocked is not None:
        now_ns += getattr(blocked, "guest_ns", 0) or getattr(blocked, "wake_after_ns", 0) or 0
        guest.vcpu.wake(now_ns)
        blocked = guest.vcpu.resume(now_ns)
    return guest.vcpu.run.exit_reason


@pytest.mark.parametrize("preset", [OFF, RATELIMIT])
def test_without_ac_the_lock_is_a_bus_lock_exit_at_once(start, preset):
    guest = start(preset, INC, HLT)
    assert guest.run() == Exit.X86_BUS_LOCK
    assert guest.word_at(DATA + 62, 4) == 1


def test_warn_makes_the_thread_sleep_and_then_the_lock_happens(start):
    guest = start(WARN, INC, HLT)
    rest_ns, now_ns = slept_ns(guest, 0)
    assert rest_ns == 10 * MS
    assert (guest.regs("rip"), guest.word_at(DATA + 62, 4)) == (CODE, 0)
    assert guest.vcpu.statistics().phase == "asleep"
    assert go_on(guest, now_ns + 10 * MS) == Exit.X86_BUS_LOCK
    assert (guest.regs("rip"), guest.word_at(DATA + 62, 4)) == (CODE + 3, 1)
    assert guest.vcpu.bus_locks == 1


def test_for_two_ticks_split_locks_pass_and_then_they_are_detected_again(start):
    guest = start(WARN, INC, "eb fb")  # for ever
    _, now_ns = slept_ns(guest, 0)
    now_ns += 10 * MS
    assert go_on(guest, now_ns) == Exit.X86_BUS_LOCK
    passed = 0
    blocked = guest.vcpu.kvm_run(now_ns)
    while not isinstance(blocked, Halted):
        now_ns += 1 * MS
        blocked = guest.vcpu.resume(now_ns)
        if blocked is None:
            passed += 1
            blocked = guest.vcpu.kvm_run(now_ns)
    assert passed == 8
    assert blocked.wake_after_ns == 10 * MS


def test_only_the_first_split_lock_of_a_thread_is_printed(start):
    guest = start(WARN, INC, "eb fb")
    _, now_ns = slept_ns(guest, 0)
    go_on(guest, now_ns + 10 * MS)
    _, now_ns = slept_ns(guest, now_ns + 1000 * MS)
    assert list(guest.vm.machine.split_lock.log) == [
        "x86/split lock detection: #AC: CPU 0/KVM/4194304 took a split_lock trap at address: 0x1000"
    ]


def test_a_signal_ends_the_sleep_and_the_next_run_begins_another(start):
    guest = start(WARN, INC, HLT)
    _, now_ns = slept_ns(guest, 0)
    with pytest.raises(KvmError):
        guest.vcpu.interrupt(now_ns + MS)
    assert guest.word_at(DATA + 62, 4) == 0
    rest_ns, _ = slept_ns(guest, now_ns + 2 * MS)
    assert rest_ns == 10 * MS


def test_waking_early_is_sleeping_on(start):
    guest = start(WARN, INC, HLT)
    _, now_ns = slept_ns(guest, 0)
    guest.vcpu.wake(now_ns + 4 * MS)
    assert guest.vcpu.resume(now_ns + 4 * MS).wake_after_ns == 6 * MS


def test_without_mitigation_the_lock_happens_at_once(start):
    guest = start(QUIET, INC, HLT)
    assert guest.run() == Exit.X86_BUS_LOCK
    assert guest.vm.machine.split_lock.log


def test_fatal_is_an_exception_exit_with_a_signal(start):
    guest = start(FATAL, INC, HLT)
    signals = []
    guest.vcpu.on_signal = lambda vcpu, number: signals.append((vcpu.id, number))
    assert guest.run() == Exit.EXCEPTION
    exception, code = (
        int.from_bytes(guest.vcpu.run.memory[at : at + 4], "little") for at in (32, 36)
    )
    assert (exception, code, signals) == (AC, 0, [(0, 7)])
    assert (guest.regs("rip"), guest.word_at(DATA + 62, 4), guest.vcpu.bus_locks) == (CODE, 0, 0)


def test_fatal_again_when_user_space_goes_on(start):
    guest = start(FATAL, INC, HLT)
    assert [guest.run(), guest.run()] == [Exit.EXCEPTION, Exit.EXCEPTION]


@pytest.mark.parametrize(("am", "ac", "reflected"), [(1, 1, True), (1, 0, False), (0, 1, False)])
def test_an_alignment_check_of_a_ring_3_guest_is_the_guests(start, am, ac, reflected):
    guest = start(FATAL, INC, "90", ring=3).gate(AC, HLT)
    special = sregs.of(guest.vcpu)
    special.put("cr0", special.get("cr0") | am << 18)
    guest.set_regs(rflags=2 | ac << 18)
    assert guest.run() == (Exit.HLT if reflected else Exit.EXCEPTION)
    if reflected:
        frame = guest.regs("rsp")
        assert [guest.word_at(frame), guest.word_at(frame + 8)] == [0, CODE]


def test_in_ring_0_there_is_no_alignment_check(start):
    guest = start(FATAL, INC, HLT).gate(AC, HLT)
    special = sregs.of(guest.vcpu)
    special.put("cr0", special.get("cr0") | 1 << 18)
    guest.set_regs(rflags=2 | 1 << 18)
    assert guest.run() == Exit.EXCEPTION


def test_locks_on_uncacheable_memory_are_none_of_its_business(start):
    guest = start(FATAL, INC, HLT)
    guest.word(0x10000 + 3 * 4096 + 8 * 8, DATA | 0x1F)  # PCD, PWT
    guest.set_regs(rdi=DATA)
    assert guest.run() == Exit.X86_BUS_LOCK


@pytest.mark.parametrize("index", [0x33, 0xCF])
def test_guests_have_no_control_of_it(start, index):
    guest = start(FATAL, f"b9 {index:02x} 00 00 00 0f 32", HLT).offer_everything().gate(13, HLT)
    assert msrs.read(guest.vcpu, index, 0) is None
    assert not msrs.write(guest.vcpu, index, 0, 0)
    assert guest.run() == Exit.HLT
    assert guest.regs("rip") == HANDLER + 1
