"""What a guest engine is, and the reasons for which a guest stops.

A guest engine answers one question: given this vCPU, what is the next thing that takes it out of
the guest, and after how much guest time? KVM (``kvmsim.kvm.run``) asks at every entry to the guest
and decides what the stop means: an exit to user space, work for the kernel, or nothing at all.

Rules an engine can rely on:

* ``next_stop`` is called once per stop. A stop that was interrupted (signal, kick) is not asked for
  again: KVM resumes the rest of its ``after_ns``.
* ``after_ns`` is guest time: time in which this vCPU executes. Stalls by other vCPUs' bus locks and
  waits for admission come on top and are the caller's business.
* A stop object may be the engine's own, changed and returned again: KVM keeps it no longer than
  until it asks for the next one, and never changes it.
* An engine must be deterministic. Chance comes from a seeded stream it was built with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsim.engine.x86.lbr import LastBranches


@dataclass(slots=True)
class StopBase:
    """What every stop has.

    Attributes:
        after_ns: guest time from entry (or from the previous stop) until this one.
        bus_lock: the instruction took a bus lock besides (exit-reason bit 26 on trap-like
            hardware; fault-like hardware reports the lock first, as an exit of its own).
        cpl: privilege level of the instruction, 0 to 3.
        insn_len: bytes by which RIP moves when the instruction completes. 0 for guests without
            code, whose RIP never moves.
    """

    after_ns: int = 0
    bus_lock: bool = False
    cpl: int = 0
    insn_len: int = 0


@dataclass(slots=True)
class BusLock(StopBase):
    """A bus lock and nothing else: on trap-like hardware taken, on fault-like about to be."""


@dataclass(slots=True)
class Hlt(StopBase):
    """HLT.

    Attributes:
        wake_after_ns: time until the guest's own timer ends the halt, where KVM emulates the local
            APIC; ``None``: nothing but a kick ends it.
    """

    wake_after_ns: int | None = None


@dataclass(slots=True)
class Io(StopBase):
    """IN or OUT.

    Attributes:
        port: port number, 0 to 0xffff.
        size: bytes per element: 1, 2 or 4.
        data: what OUT writes, a whole number of elements; empty for IN.
        count: elements of a string instruction; the length of ``data`` decides for OUT.
    """

    port: int = 0
    size: int = 1
    data: bytes = b""
    count: int = 1


@dataclass(slots=True)
class Mmio(StopBase):
    """An access to guest-physical memory behind which there is no memslot.

    Attributes:
        gpa: guest-physical address.
        size: bytes, 1 to 8.
        data: what is written; empty for a read.
    """

    gpa: int = 0
    size: int = 4
    data: bytes = b""


@dataclass(slots=True)
class Shutdown(StopBase):
    """Triple fault."""


@dataclass(slots=True)
class InternalError(StopBase):
    """Something KVM cannot emulate.

    Attributes:
        suberror: 1 emulation, 2 simultaneous exceptions, 3 event delivery, 4 unexpected exit.
        data: up to 16 words for the VMM.
    """

    suberror: int = 1
    data: tuple[int, ...] = ()


@dataclass(slots=True)
class Debug(StopBase):
    """A debug exception that belongs to the VMM.

    Attributes:
        exception: vector, 1 (#DB) or 3 (#BP).
        dr6: the cause, every bit active high.
        dr7: the DR7 that counted.
        pc: linear address of the next instruction; None: RIP is one.
    """

    exception: int = 1
    dr6: int = 0
    dr7: int = 0x400
    pc: int | None = None


@dataclass(slots=True)
class IrqWindow(StopBase):
    """The guest can take an interrupt and the VMM had asked to know."""


@dataclass(slots=True)
class TprLowered(StopBase):
    """The guest set its task priority lower, and the VMM has the APIC."""


@dataclass(slots=True)
class Signal(StopBase):
    """A signal arrives for the thread that runs the vCPU: KVM_RUN returns EINTR."""


@dataclass(slots=True)
class Rdmsr(StopBase):
    """RDMSR that user space carries out; ``input`` is then an error byte and 8 bytes of data.

    Attributes:
        index: of the register.
        reason: ``KVM_MSR_EXIT_REASON_*``.
    """

    index: int = 0
    reason: int = 0


@dataclass(slots=True)
class Wrmsr(StopBase):
    """WRMSR that user space carries out; ``input`` is then an error byte.

    Attributes:
        index: of the register.
        data: what the guest writes.
        reason: ``KVM_MSR_EXIT_REASON_*``.
    """

    index: int = 0
    data: int = 0
    reason: int = 0


@dataclass(slots=True)
class Hypercall(StopBase):
    """A hypercall that user space carries out; ``input`` is then its result, 8 bytes.

    Attributes:
        number: ``KVM_HC_*``.
        args: RBX, RCX, RDX and RSI, as wide as the guest's mode has them.
        flags: ``KVM_EXIT_HYPERCALL_*``.
    """

    number: int = 0
    args: tuple[int, int, int, int] = (0, 0, 0, 0)
    flags: int = 0


@dataclass(slots=True)
class SystemEvent(StopBase):
    """The guest ends, or asks for something that concerns the whole machine.

    Attributes:
        kind: ``KVM_SYSTEM_EVENT_*``.
        data: up to 16 words for the VMM.
    """

    kind: int = 0
    data: tuple[int, ...] = ()


@dataclass(slots=True)
class SplitLockAc(StopBase):
    """#AC for a split lock, which has not happened: the host's processor detects them."""


@dataclass(slots=True)
class InKernel(StopBase):
    """An exit KVM handles itself: EPT violation, CPUID, preemption timer. The guest goes on."""


def _nothing() -> None:
    """What an :class:`Executing` does that nobody gave anything to do."""


@dataclass(slots=True)
class Executing(InKernel):
    """The guest has not stopped yet: it executes on in ``work``; afterwards KVM enters again.

    At most one ``work`` of a VM may be under way at a time, and the next one may start only when
    what followed the last (``next_stop`` of that vCPU, or ``end``) has returned.

    Attributes:
        work: executes guest code, in any one thread, until the engine has a reason to stop, or is
            kicked. It touches nothing of KVM's and raises nothing for a guest's reasons.
        kick: makes ``work`` end soon; from any thread, also before ``work`` begins.
        end: what ``work`` came to becomes the state of the vCPU, and KVM's registers are the
            guest's again: for a vCPU that leaves the guest instead of entering again. Called in
            KVM's thread while no ``work`` of the VM is under way, or before this one was.
        yields: the guest waits for another of its vCPUs, which had better execute before.
    """

    work: Callable[[], None] = _nothing
    kick: Callable[[], None] = _nothing
    end: Callable[[], None] = _nothing
    yields: bool = False


Stop = (
    BusLock
    | Hlt
    | Io
    | Mmio
    | Rdmsr
    | Wrmsr
    | Hypercall
    | Shutdown
    | SystemEvent
    | InternalError
    | Debug
    | IrqWindow
    | TprLowered
    | Signal
    | SplitLockAc
    | InKernel
)


class GuestVcpu(Protocol):
    """What an engine may know about the vCPU it moves."""

    @property
    def id(self) -> int:
        """Id of the vCPU."""

    @property
    def rip(self) -> int:
        """Instruction pointer."""

    @property
    def input(self) -> bytes:
        """What the last completed IN or MMIO read brought."""

    @property
    def allowance_ns(self) -> int | None:
        """Guest time after which KVM wants it back; None: there is no hurry."""

    @property
    def records(self) -> LastBranches | None:
        """Where its branches are recorded; None: nowhere."""


class GuestEngine(Protocol):
    """Makes one vCPU (or several) move."""

    def next_stop(self, vcpu: GuestVcpu) -> Stop:
        """Say what stops the guest next, counted from now.

        Args:
            vcpu: the vCPU that enters the guest.
        """


class Parked:
    """The engine of a vCPU nobody gave one: it halts, for good."""

    __slots__ = ()

    def next_stop(self, vcpu: GuestVcpu) -> Stop:
        """Halt without a timer."""
        return Hlt()
