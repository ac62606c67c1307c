"""Ports, CPUID, MSRs and the other instructions that leave the guest."""

import pytest

from kvmsim.engine.base import Hlt, InKernel, InternalError, Io, Mmio
from kvmsim.engine.x86 import registers as r
from kvmsim.engine.x86 import state
from kvmsim.engine.x86.policy import PlainPolicy

CODE, DATA = 0x1000, 0x8000
HLT = "f4"


@pytest.mark.parametrize(
    ("code", "port", "data"),
    [
        ("e6 80", 0x80, "78"),
        ("ee", 0x3F8, "78"),
        ("66 ef", 0x3F8, "7856"),
        ("ef", 0x3F8, "78563412"),
    ],
)
def test_out_stops_at_the_instruction_and_goes_on_behind_it(guest, code, port, data):
    guest.long(code, HLT)
    guest.q[r.RAX], guest.q[r.RDX] = 0x12345678, 0x3F8
    stop = guest.run()
    assert isinstance(stop, Io)
    assert (stop.port, stop.data) == (port, bytes.fromhex(data))
    assert guest.r.rip == CODE
    guest.cpu.complete()
    assert isinstance(guest.run(), Hlt)


@pytest.mark.parametrize(
    ("code", "size", "rax"),
    [
        ("ec", 1, 0xFFFFFFFFFFFFFF01),
        ("66 ed", 2, 0xFFFFFFFFFFFF0201),
        ("ed", 4, 0x04030201),
    ],
)
def test_in_fills_its_register_when_it_is_completed(guest, code, size, rax):
    guest.long(code, HLT)
    guest.q[r.RAX] = r.U64
    stop = guest.run()
    assert isinstance(stop, Io)
    assert (stop.size, stop.data, guest.q[r.RAX]) == (size, b"", r.U64)
    guest.cpu.complete(bytes([1, 2, 3, 4][:size]))
    assert (guest.q[r.RAX], guest.r.rip) == (rax, CODE + len(bytes.fromhex(code)))


def test_an_abandoned_in_is_not_completed(guest):
    guest.long("ec", HLT)
    guest.q[r.RAX] = 7
    assert isinstance(guest.run(), Io)
    guest.r.rip = CODE + 1
    guest.cpu.abandon()
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RAX] == 7


def test_a_run_before_completion_is_a_mistake(guest):
    guest.long("ec", HLT)
    guest.run()
    with pytest.raises(RuntimeError):
        guest.run()


def test_rep_outsb_goes_out_byte_by_byte(guest):
    guest.long("f3 6e", HLT)
    guest.ram[DATA : DATA + 3] = b"abc"
    guest.q[r.RSI], guest.q[r.RCX], guest.q[r.RDX] = DATA, 3, 0xE9
    seen = b""
    while isinstance(stop := guest.run(), Io):
        seen += stop.data
        guest.cpu.complete()
    assert seen == b"abc"
    assert (guest.q[r.RSI], guest.q[r.RCX]) == (DATA + 3, 0)


def test_rep_insw_fills_memory_downwards_with_the_direction_flag(guest):
    guest.long("fd", "66 f3 6d", HLT)  # std; rep insw
    guest.q[r.RDI], guest.q[r.RCX] = DATA + 2, 2
    assert isinstance(guest.run(), Io)
    guest.cpu.complete(b"\x01\x02")
    assert isinstance(guest.run(), Io)
    guest.cpu.complete(b"\x03\x04")
    assert isinstance(guest.run(), Hlt)
    assert guest.ram[DATA : DATA + 4] == b"\x03\x04\x01\x02"
    assert guest.q[r.RDI] == (DATA - 2)


def test_outs_with_a_count_of_zero_does_nothing(guest):
    guest.long("f3 6e", HLT)
    guest.q[r.RCX] = 0
    assert isinstance(guest.run(), Hlt)


class Machine(PlainPolicy):
    def cpuid(self, cpu, leaf, subleaf):
        return (leaf + 1, subleaf + 2, 3, 4)

    def rdmsr(self, cpu, index):
        return 0x1122334455667788 if index == 0x1234 else None

    def wrmsr(self, cpu, index, value):
        self.written = (index, value)
        return True


def test_cpuid_and_msrs_are_answered_by_the_policy(make_guest):
    guest = make_guest(Machine())
    guest.long("b8 07 00 00 00", "b9 05 00 00 00", "0f a2", HLT)
    assert isinstance(guest.run(), Hlt)
    assert [guest.q[n] for n in (r.RAX, r.RBX, r.RCX, r.RDX)] == [8, 7, 3, 4]
    guest.long("b9 34 12 00 00", "0f 32", "0f 30", HLT)
    assert isinstance(guest.run(), Hlt)
    assert (guest.q[r.RAX], guest.q[r.RDX]) == (0x55667788, 0x11223344)
    assert guest.policy.written == (0x1234, 0x1122334455667788)


def test_the_time_stamp_counter_counts_executed_code(guest):
    guest.long("0f 31", "89 c3", *["90"] * 1200, "0f 31", HLT)
    assert isinstance(guest.run(), Hlt)
    assert guest.cpu.guest_ns > 0
    again = guest.cpu.tsc
    guest.r.rip = CODE
    assert isinstance(guest.run(), Hlt)
    assert guest.cpu.tsc > again


def test_time_is_the_same_in_every_run(make_guest):
    times = []
    for _ in range(2):
        guest = make_guest().long("ff c9", "75 fc", HLT)  # dec ecx; jnz
        guest.q[r.RCX] = 100_000
        times.append(guest.run().after_ns)
    assert times[0] == times[1] > 0


def test_a_spinning_guest_stops_at_the_end_of_its_slice(make_guest):
    guest = make_guest(slice_bytes=10_000).long("eb fe")
    stop = guest.run()
    assert isinstance(stop, InKernel)
    assert stop.after_ns == pytest.approx(10_000 / 12, abs=2)
    assert guest.r.rip == CODE


def test_slices_do_not_change_what_a_guest_computes(make_guest):
    code = ("48 01 c8", "48 69 c0 35 01 00 00", "ff 07", "48 ff c9", "75 f0", HLT)
    results = []
    for slice_bytes in (1 << 40, 1000, 77):
        guest = make_guest(slice_bytes=slice_bytes).long(*code)
        guest.q[r.RCX], guest.q[r.RAX], guest.q[r.RDI] = 5000, 1, DATA
        while not isinstance(guest.run(), Hlt):
            pass
        results.append((guest.q[r.RAX], guest.word(DATA)))
    assert results[0] == results[1] == results[2]
    assert results[0][1] == 5000


def test_mmio_read_fills_the_register(guest):
    guest.long("66 8b 07", HLT)  # mov ax, [rdi]
    guest.map_page(DATA, 0xFED00000)
    guest.q[r.RDI] = DATA + 4
    stop = guest.run()
    assert isinstance(stop, Mmio)
    assert (stop.gpa, stop.size, stop.data) == (0xFED00004, 2, b"")
    assert guest.r.rip == CODE
    guest.cpu.complete(b"\x34\x12")
    assert guest.r.rip == CODE + 3
    assert guest.q[r.RAX] & 0xFFFF == 0x1234
    assert isinstance(guest.run(), Hlt)


@pytest.mark.parametrize(
    ("code", "data"),
    [("88 07", "78"), ("89 07", "78563412"), ("48 89 07", "7856341200000000")],
)
def test_mmio_write_goes_out_once(guest, code, data):
    guest.long(code, HLT)
    guest.map_page(DATA, 0xFED00000)
    guest.q[r.RDI], guest.q[r.RAX] = DATA, 0x12345678
    stop = guest.run()
    assert isinstance(stop, Mmio)
    assert stop.data == bytes.fromhex(data)
    guest.cpu.complete()
    assert isinstance(guest.run(), Hlt)


def test_mmio_read_modify_write_is_a_read_and_a_write(guest):
    guest.long("83 07 05", HLT)  # add dword [rdi], 5
    guest.map_page(DATA, 0xFED00000)
    guest.q[r.RDI] = DATA
    read = guest.run()
    assert isinstance(read, Mmio)
    assert (read.data, read.size) == (b"", 4)
    guest.cpu.complete(b"\x02\0\0\0")
    write = guest.run()
    assert isinstance(write, Mmio)
    assert write.data == b"\x07\0\0\0"
    guest.cpu.complete()
    assert isinstance(guest.run(), Hlt)


def test_a_move_from_device_to_device_is_read_then_written(guest):
    guest.long("a4", HLT)  # movsb
    guest.map_page(DATA, 0xFED00000)
    guest.map_page(DATA + 0x1000, 0xFED01000)
    guest.q[r.RSI], guest.q[r.RDI] = DATA, DATA + 0x1000
    read = guest.run()
    assert isinstance(read, Mmio)
    assert (read.gpa, read.data) == (0xFED00000, b"")
    guest.cpu.complete(b"x")
    write = guest.run()
    assert isinstance(write, Mmio)
    assert (write.gpa, write.data) == (0xFED01000, b"x")
    guest.cpu.complete()
    assert isinstance(guest.run(), Hlt)
    assert guest.q[r.RSI] == DATA + 1


def test_many_device_accesses_leave_exceptions_working(guest):
    guest.long(*["8a 07"] * 6, "0f 0b").gate(6, 0x2000)
    guest.put(0x2000, HLT)
    guest.map_page(DATA, 0xFED00000)
    guest.q[r.RDI] = DATA
    for value in range(6):
        assert isinstance(guest.run(), Mmio)
        guest.cpu.complete(bytes([value]))
        assert guest.q[r.RAX] & 0xFF == value
    assert isinstance(guest.run(), Hlt)
    assert guest.r.rip == 0x2001


def test_code_in_a_hole_is_an_emulation_failure(guest):
    guest.long("ff e0")  # jmp rax
    guest.map_page(0x9000, 0xFED00000)
    guest.q[r.RAX] = 0x9000
    stop = guest.run()
    assert isinstance(stop, InternalError)
    assert stop.suberror == 1


def test_registers_move_to_another_vm_at_any_stop(make_guest):
    code = ("0f c1 c8", "69 c0 0d 66 19 00", "ee", "f2 0f 58 c1", "48 ff ce", "75 ed", HLT)

    def start():
        guest = make_guest().long(*code)
        guest.q[r.RAX], guest.q[r.RCX], guest.q[r.RSI] = 1, 3, 5
        guest.r.set_xmm(1, bytes.fromhex("000000000000f03f0000000000000000"))
        return guest

    still, moving = start(), start()
    while isinstance(stop := still.run(), Io):
        other = moving.run()
        assert (stop.data, stop.after_ns) == (other.data, other.after_ns)
        still.cpu.complete()
        moving.cpu.complete()
        target = start()
        target.ram[:] = moving.ram[:]
        state.restore(target.cpu, state.save(moving.cpu))
        moving = target
    assert isinstance(moving.run(), Hlt)
    assert [moving.q[n] for n in range(16)] == [still.q[n] for n in range(16)]
    assert moving.r.xmm(0) == still.r.xmm(0) != bytes(16)


def test_two_vcpus_share_memory_and_keep_their_registers(guest):
    guest.long("f0 ff 07", "ff c3", "f4", "eb f8")
    other = guest.vm.add_cpu()
    other.saved[:] = guest.cpu.saved
    other.use_saved()
    for cpu in (guest.cpu, other):
        cpu.registers.q[r.RDI] = DATA
        cpu.registers.q[r.RBX] = 0
    for _ in range(3):
        assert isinstance(guest.vm.run(guest.cpu), Hlt)
        assert isinstance(guest.vm.run(other), Hlt)
    assert isinstance(guest.vm.run(other), Hlt)
    assert (guest.q[r.RBX], other.registers.q[r.RBX], guest.word(DATA)) == (3, 4, 7)


def test_real_to_long_mode_by_the_guests_own_code(guest):
    guest.long()  # page tables
    guest.cpu.reset()
    gdt = 0x3000
    guest.put(0x3100, "3f 00", "00 30 00 00")  # GDT register
    guest.put(
        CODE,
        "fa",  # cli
        "0f 20 e0",  # mov eax, cr4
        "66 0d 20 00 00 00",  # or eax, 0x20
        "0f 22 e0",  # mov cr4, eax
        "66 b8 00 00 01 00",  # mov eax, 0x10000
        "0f 22 d8",  # mov cr3, eax
        "66 b9 80 00 00 c0",  # mov ecx, 0xc0000080
        "0f 32",  # rdmsr
        "66 0d 00 09 00 00",  # or eax, 0x900
        "0f 30",  # wrmsr
        "66 0f 01 16 00 31",  # lgdt [0x3100]
        "66 b8 01 00 01 80",  # mov eax, 0x80010001
        "0f 22 c0",  # mov cr0, eax
        "66 ea 00 20 00 00 08 00",  # jmp 8:0x2000
    )
    guest.put(0x2000, "b8 10 00 00 00", "8e d8 8e c0 8e d0", "48 b8" + "88" * 8, HLT)
    guest.r.set_segment(r.CS, r.Segment(0, 0, 0xFFFF, guest.r.segment(r.CS).rights))
    guest.r.rip = CODE
    assert guest.word(gdt + 8, 8)
    assert isinstance(guest.run(), Hlt)
    assert (guest.r.mode, guest.r.long_mode) == (64, True)
    assert guest.q[r.RAX] == 0x8888888888888888


def test_after_reset_the_first_instruction_is_at_the_top_of_memory(make_guest):
    guest = make_guest()
    stop = guest.run()
    assert isinstance(stop, InternalError)
    assert guest.r.linear_rip == 0xFFFFFFF0
