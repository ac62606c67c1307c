"""The ``kvm_run`` page of one vCPU, at its real offsets.

The page is any writable buffer of at least one page: a ``bytearray`` here, a shared mapping when
the vCPU belongs to another process. It is read and written in place; views of the common widths
are made once because every exit goes through them.
"""

from __future__ import annotations

from kvmsim.abi.run import MMAP_SIZE_BYTES, PIO_DATA_OFFSET

# Indices into the typed views of the page.
U8_REQUEST_INTERRUPT_WINDOW = 0
U8_IMMEDIATE_EXIT = 1
U32_EXIT_REASON = 2
U16_WISHES = 0  # request_interrupt_window, and above it immediate_exit
U16_READY_AND_IF = 6  # ready_for_interrupt_injection and if_flag at once
U16_FLAGS = 7
U64_CR8 = 2
U64_APIC_BASE = 3
U64_VALID_REGS = 36
U64_DIRTY_REGS = 37


class KvmRun:
    """What user space sees of a vCPU between two runs.

    Args:
        buffer: the page; a private one by default.

    Attributes:
        memory: the page's bytes.
        u8: the same bytes, as unsigned 8-bit numbers.
        u16: as 16-bit numbers.
        u32: as 32-bit numbers.
        u64: as 64-bit numbers.
    """

    __slots__ = ("memory", "u8", "u16", "u32", "u64")

    def __init__(self, buffer: bytearray | memoryview | None = None) -> None:
        view = memoryview(bytearray(MMAP_SIZE_BYTES) if buffer is None else buffer).cast("B")
        self.memory = view
        self.u8 = view
        self.u16 = view.cast("H")
        self.u32 = view.cast("I")
        self.u64 = view.cast("Q")

    def close(self) -> None:
        """Let go of the page; nothing of it may be used afterwards."""
        for view in (self.u64, self.u32, self.u16, self.u8):
            view.release()

    @property
    def request_interrupt_window(self) -> int:
        """In: stop when the guest can take an interrupt."""
        return self.u8[U8_REQUEST_INTERRUPT_WINDOW]

    @request_interrupt_window.setter
    def request_interrupt_window(self, value: int) -> None:
        self.u8[U8_REQUEST_INTERRUPT_WINDOW] = value

    @property
    def immediate_exit(self) -> int:
        """In: finish what is pending and return EINTR."""
        return self.u8[U8_IMMEDIATE_EXIT]

    @immediate_exit.setter
    def immediate_exit(self, value: int) -> None:
        self.u8[U8_IMMEDIATE_EXIT] = value

    @property
    def exit_reason(self) -> int:
        """Why the guest stopped."""
        return self.u32[U32_EXIT_REASON]

    @property
    def flags(self) -> int:
        """``KVM_RUN_X86_*``."""
        return self.u16[U16_FLAGS]

    @flags.setter
    def flags(self, value: int) -> None:
        self.u16[U16_FLAGS] = value

    @property
    def ready_for_interrupt_injection(self) -> int:
        """Whether an interrupt could be injected now."""
        return self.u8[12]

    @property
    def if_flag(self) -> int:
        """The guest's interrupt flag."""
        return self.u8[13]

    @property
    def cr8(self) -> int:
        """Task priority; in and out without an in-kernel APIC."""
        return self.u64[U64_CR8]

    @cr8.setter
    def cr8(self, value: int) -> None:
        self.u64[U64_CR8] = value

    @property
    def apic_base(self) -> int:
        """The guest's APIC base register."""
        return self.u64[U64_APIC_BASE]

    @property
    def kvm_valid_regs(self) -> int:
        """In: register sets to copy out at every exit."""
        return self.u64[U64_VALID_REGS]

    @kvm_valid_regs.setter
    def kvm_valid_regs(self, value: int) -> None:
        self.u64[U64_VALID_REGS] = value

    @property
    def kvm_dirty_regs(self) -> int:
        """In: register sets to take over at the next entry."""
        return self.u64[U64_DIRTY_REGS]

    @kvm_dirty_regs.setter
    def kvm_dirty_regs(self, value: int) -> None:
        self.u64[U64_DIRTY_REGS] = value

    # The union, of the exits a VMM of this process handles.

    @property
    def io(self) -> tuple[int, int, int, int]:
        """Port I/O: direction (0 in, 1 out), bytes per element, port, elements."""
        return self.u8[32], self.u8[33], self.u16[17], self.u32[9]

    def io_data(self, data: bytes | None = None) -> bytes:
        """Read the bytes of a port exit, or (``data``) answer an IN."""
        size_bytes = self.u8[33] * self.u32[9]
        area = self.memory[PIO_DATA_OFFSET : PIO_DATA_OFFSET + size_bytes]
        if data is not None:
            area[:] = data
        return bytes(area)

    @property
    def mmio(self) -> tuple[int, bytes, int]:
        """MMIO: guest-physical address, the bytes, 1 for a write."""
        return self.u64[4], bytes(self.memory[40 : 40 + self.u32[12]]), self.u8[52]

    def answer_mmio(self, data: bytes) -> None:
        """Give an MMIO read its value."""
        self.memory[40 : 40 + len(data)] = data
