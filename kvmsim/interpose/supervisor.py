"""Answers the trapped calls of one client and its children.

A call comes out of the listener, its descriptor is looked up by what is open under that number in
the calling thread, KVM carries it out, and the answer goes back. All of that is synchronous: most
calls are answered before anything else happens. Only KVM_RUN may be kept waiting.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from errno import EINTR, EIO, ENOENT
from typing import TYPE_CHECKING

import trio

from kvmsim.abi.exits import Exit
from kvmsim.abi.ioctls import (
    KVM_CLEAR_DIRTY_LOG,
    KVM_CREATE_VM,
    KVM_GET_DIRTY_LOG,
    KVM_MEMORY_ENCRYPT_OP,
    KVM_RUN,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
)
from kvmsim.abi.run import MMAP_SIZE_BYTES
from kvmsim.errors import KvmError
from kvmsim.interpose import libc
from kvmsim.interpose.clients import FRESH_NS, Clients
from kvmsim.interpose.code_guests import CodeVms
from kvmsim.interpose.descriptors import Descriptors
from kvmsim.interpose.eventfds import Eventfds
from kvmsim.interpose.executor import Stuck
from kvmsim.interpose.filter import NR_IOCTL
from kvmsim.interpose.notify import answer_calls
from kvmsim.interpose.parked import Parked
from kvmsim.interpose.remap import Remap
from kvmsim.interpose.roles import Readable, Releasable
from kvmsim.interpose.runs import Run, fail
from kvmsim.kvm import steal_time
from kvmsim.kvm.devsev import SevFile
from kvmsim.kvm.dispatch import KvmFile
from kvmsim.kvm.page import U32_EXIT_REASON, KvmRun
from kvmsim.kvm.run import OUT, InGuest
from kvmsim.kvm.system import System
from kvmsim.kvm.vcpu import Vcpu
from kvmsim.kvm.vm import Vm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmsim.engine.base import GuestEngine
    from kvmsim.interpose.clients import Process, Thread
    from kvmsim.interpose.descriptors import Descriptor
    from kvmsim.interpose.namespace import Identity
    from kvmsim.interpose.notify import Listener, Notification
    from kvmsim.interpose.roles import OtherCalls, Tap
    from kvmsim.kvm.eventfds import Eventfd
    from kvmsim.kvm.run import Blocked
    from kvmsim.vmm.run_loop import RunLoop

log = logging.getLogger(__name__)

_DOUBT_S = 0.001
_DOUBTS = 5
_LOW32 = 0xFFFF_FFFF

#: Calls to a VM about its memory; no code of its guest executes meanwhile.
_MEMORY_CALLS = frozenset(
    {
        KVM_SET_USER_MEMORY_REGION,
        KVM_SET_USER_MEMORY_REGION2,
        KVM_MEMORY_ENCRYPT_OP,
        KVM_GET_DIRTY_LOG,
        KVM_CLEAR_DIRTY_LOG,
    }
)


class Supervisor:
    """Serves one client tree.

    Args:
        listener: where its calls come out.
        devices: what is behind each device node.
        loop: time of the emulated host; its timeline is driven by whoever made it.
        engine: makes the guest of a new vCPU; None: guests halt for ever.
        executes: guests are what is in their memory: x86 code; ``engine`` is not used then.
        tap: sees every call.
        other_calls: answers those that are no ioctls.

    Attributes:
        listener: as given.
        loop: as given.
        descriptors: every object the clients hold.
        clients: who has called.
        parked: KVM_RUNs that wait for their guests.
        nr_calls: calls received.
    """

    def __init__(
        self,
        listener: Listener,
        devices: Mapping[Identity, KvmFile],
        loop: RunLoop,
        *,
        engine: Callable[[Vcpu], GuestEngine] | None = None,
        executes: bool = False,
        tap: Tap | None = None,
        other_calls: OtherCalls | None = None,
    ) -> None:
        self.listener = listener
        self.loop = loop
        self.descriptors = Descriptors()
        self.clients = Clients(self)
        self.nr_calls = 0
        self._devices = dict(devices)
        self._engine = engine
        self._code = CodeVms(loop) if executes else None
        self._tap = tap
        self._other_calls = other_calls
        self._limited = loop.timeline.has_limiter
        self._runs: dict[Vcpu, Run] = {}
        self._readable: dict[Readable, Descriptor] = {}
        self.parked = Parked(listener, loop, self._gone)
        self._calling: Thread | None = None
        self._late: list[Notification] = []
        self._late_one = trio.Event()
        self._number = 0
        self._closed_poll = self.descriptors.poll
        self._eventfds = Eventfds(loop.catch_up)

    # -- tasks -----------------------------------------------------------------------------

    async def serve(self) -> None:
        """Answer calls until no task of the client tree is left."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_closes)
            nursery.start_soon(self.parked.watch_signals)
            nursery.start_soon(self._handle_late)
            nursery.start_soon(self._eventfds.serve)
            await answer_calls(self.listener, self.handle)
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Release everything the clients held; calls that still come fail with ENOSYS."""
        self.listener.close()
        now_ns = self.loop.catch_up()
        for run in self.parked:
            self._abandon(run, now_ns)
        self.descriptors.close(self._released)
        if self._code is not None:
            self._code.close()
        self.clients.close()
        self._eventfds.close()

    async def _watch_closes(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.descriptors.fd)
            self.note_closes()
            for _ in range(_DOUBTS):
                if not self.descriptors.in_doubt():
                    break
                await trio.sleep(_DOUBT_S)
                self.note_closes()
            else:
                self.descriptors.settle()

    async def _handle_late(self) -> None:
        """Handle the calls that waited for a vCPU."""
        while True:
            await self._late_one.wait()
            self._late_one = trio.Event()
            late, self._late = self._late, []
            for notification in late:
                self.handle(notification)

    # -- calls -----------------------------------------------------------------------------

    def handle(self, notification: Notification) -> None:
        """Carry a call out and answer it, or keep it waiting."""
        self.nr_calls += 1
        if self._closed_poll(0):
            self.note_closes()
        number, tid, nr, _, fd, request, arg = notification
        thread = self.clients.known(tid) or self._meet(number, tid)
        if thread is None:
            return
        if nr != NR_IOCTL:
            self._handle_other(notification, thread)
            return
        file = self.file_of(thread, fd & _LOW32)
        if file is None:
            # Perhaps the number is another thread's by now.
            again = self._meet(number, tid)
            if again is None:
                return
            file, thread = self.file_of(again, fd & _LOW32), again
        if file is None:
            self.listener.go_on(number)
            return
        if type(file) is Vcpu and file.phase != OUT and self._waits(file, thread, notification):
            self._runs[file].waiting.append(notification)
            return
        self._carry_out(notification, thread, file, request & _LOW32, arg)

    def file_of(self, thread: Thread, fd: int) -> KvmFile | None:
        """What a thread has open under a number, if it is ours."""
        try:
            status = os.stat(f"fd/{fd}", dir_fd=thread.directory)
        except OSError:
            return None
        identity = (status.st_dev, status.st_ino)
        file = self.descriptors.find(identity)
        if file is not None:
            return file
        file = self._devices.get(identity)
        if isinstance(file, SevFile):
            return file.opened(writable=_is_writable(thread, fd))
        return file

    def eventfd(self, pid: int, fd: int) -> Eventfd:
        """See :meth:`kvmsim.interpose.clients.Calls.eventfd`."""
        return self._eventfds.get(pid, fd)

    def _meet(self, number: int, tid: int) -> Thread | None:
        """The calling thread, not seen before; None if it is gone."""
        try:
            thread = self.clients.meet(tid)
        except OSError:
            # Gone, or not to be looked at: then it has no descriptor of ours.
            self.listener.go_on(number)
            return None
        # The number may have been another's by the time it was looked up.
        if not self.listener.is_valid(number):
            self.clients.forget(tid)
            return None
        return thread

    def _handle_other(self, notification: Notification, thread: Thread) -> None:
        result = None
        self._number = notification[0]
        if self._other_calls is not None:
            with suppress(OSError):
                result = self._other_calls.answer(notification, thread)
        if result is None:
            self.listener.go_on(notification[0])
        else:
            self.listener.answer(notification[0], max(result, 0), max(-result, 0))

    def _waits(self, vcpu: Vcpu, thread: Thread, notification: Notification) -> bool:
        """Whether a call has to wait for a vCPU in KVM_RUN.

        Linux refuses callers from another address space, and a dead VM, before it takes the vCPU's
        mutex (6.12 ``kvm_vcpu_ioctl``).
        """
        try:
            caller, _ = self._caller(thread, vcpu, 0, notification[3])
            vcpu.check(caller)
        except (OSError, KvmError):
            return False
        return True

    def _carry_out(
        self, notification: Notification, thread: Thread, file: KvmFile, request: int, arg: int
    ) -> None:
        """Let KVM do it and answer."""
        self._number = number = notification[0]
        self._calling = thread
        tap = self._tap
        answered = False
        try:
            caller, now_ns = self._caller(thread, file, request, notification[3])
        except OSError:
            self.listener.go_on(number)
            return
        try:
            if tap is not None and (errno := tap.called(file, request, arg, caller)):
                raise KvmError(errno, "as the fault list says")
            if request == KVM_RUN and type(file) is Vcpu and not arg:
                # Not by way of the table: no other call is made as often.
                file.check(caller)
                if self._run(file, notification, thread, now_ns):
                    return
                result = 0
            else:
                self._pause(file, request)
                outcome = file.ioctl(request, arg, caller, now_ns)
                if type(outcome) is int:
                    result = outcome
                else:
                    assert isinstance(outcome, KvmFile)
                    result = self._hand_out(number, outcome)
                    answered = True
        except KvmError as error:
            result = -error.errno
        except Exception:
            # One client's call must not end the others; Linux would have killed its task.
            log.exception("request %#x on %s", request, type(file).__name__)
            result = -EIO
        if tap is not None:
            tap.returned(file, request, arg, caller, result, now_ns)
        if not answered and self._number:
            self.listener.answer(number, max(result, 0), max(-result, 0))

    def _pause(self, file: KvmFile, request: int) -> None:
        """Let no code of a VM execute until a call about its memory is answered."""
        if self._code is not None and request in _MEMORY_CALLS and isinstance(file, Vm):
            self._code.pause(file)

    def _caller(
        self, thread: Thread, file: KvmFile, request: int, pointer: int
    ) -> tuple[Process, int]:
        """Who calls, and what time it is; OSError when it is gone."""
        if type(file) is System and request != KVM_CREATE_VM:
            # Neither the address space nor the exact time makes a difference there.
            thread.process.thread = thread
            return thread.process, self.loop.timeline.now_ns
        # With nobody waiting there is nothing to catch up on.
        waiting = request == KVM_RUN and (self.parked or self._limited)
        now_ns = self.loop.catch_up() if waiting else self.loop.now_ns()
        if now_ns - thread.checked_ns < FRESH_NS:
            thread.process.thread = thread
            return thread.process, now_ns
        return self.clients.caller(thread, pointer, now_ns), now_ns

    def _may_enter(self, vcpu: Vcpu, notification: Notification, thread: Thread) -> bool:
        """Get ready to execute guest code; whether the call waits on, or is made once more.

        Raises:
            KvmError: the guest cannot be entered.
        """
        assert self._code is not None
        number, tid = notification[:2]

        def again() -> None:
            # Unless it is made to try again, it hears of a signal, as there may be one.
            self.listener.answer(number, 0, EINTR)

        def interrupted() -> None:
            if not vcpu.run.immediate_exit:
                vcpu.run.u32[U32_EXIT_REASON] = Exit.INTR

        def remap() -> Remap:
            waiting = self.parked.threads() | {late[1] for late in self._late}
            pid = thread.process.pid
            others = waiting - {tid}
            return Remap(
                pid, tid, others, lambda fd: self.listener.install(number, fd), again, interrupted
            )

        try:
            return self._code.may_enter(vcpu, thread, remap)
        except Stuck as error:
            fail(vcpu)
            raise KvmError(EIO, "another vCPU does not stop") from error
        except OSError as error:
            raise KvmError(EIO, "the client's memory cannot be found") from error

    def interrupt_all(self) -> None:
        """Let every KVM_RUN that waits return EINTR, as a signal to its thread would."""
        now_ns = self.loop.catch_up()
        for run in self.parked:
            run.interrupt(now_ns)

    def still_waits(self) -> bool:
        """See :meth:`kvmsim.interpose.clients.Calls.still_waits`."""
        return self.listener.is_valid(self._number)

    # -- descriptors -----------------------------------------------------------------------

    def _hand_out(self, number: int, file: KvmFile) -> int:
        """Answer a call with a new descriptor; its number, or a negative errno."""
        size_bytes = MMAP_SIZE_BYTES if isinstance(file, Vcpu) else 0
        mode = os.O_RDWR
        if isinstance(file, Readable):
            size_bytes, mode = len(file.content()), os.O_RDONLY
        try:
            descriptor, handed = self.descriptors.make(file.link_name or "kvm", size_bytes, mode)
        except OSError as error:
            self._released(file)
            self.listener.answer(number, 0, errno_of(error))
            return -errno_of(error)
        descriptor.file = file
        try:
            self._set_up(file, descriptor)
            return self.listener.answer_with_descriptor(number, handed)
        except OSError as error:
            # Not handed out, so that closing it here is the last close.
            if error.errno != ENOENT:
                self.listener.answer(number, 0, errno_of(error))
            return -errno_of(error)
        finally:
            os.close(handed)

    def _set_up(self, file: KvmFile, descriptor: Descriptor) -> None:
        """Connect a new object to what is around it."""
        if isinstance(file, Vcpu):
            self._furnish(file, descriptor)
        elif isinstance(file, Vm):
            file.on_bus_lock = self.loop.timeline.bus_lock
            if self._code is not None:
                file.on_end = self._code.ended
        elif isinstance(file, Readable):
            self._readable[file] = descriptor
            self._write_contents()

    def _furnish(self, vcpu: Vcpu, descriptor: Descriptor) -> None:
        """Give a vCPU the page its clients map, and a guest."""
        assert descriptor.memory is not None
        vcpu.run = KvmRun(memoryview(descriptor.memory))
        run = self._runs[vcpu] = Run(vcpu, self.loop.timeline, self._run_ended, self._enters_again)
        vcpu.on_signal = self._signal
        if self._code is not None:
            vcpu.engine = self._code.engine(vcpu)
            run.executor = self._code.of(vcpu.vm).executor
        elif self._engine is not None:
            vcpu.engine = self._engine(vcpu)

    def _signal(self, vcpu: Vcpu, number: int) -> None:
        """KVM queues a signal for the thread that is in KVM_RUN."""
        thread = self._runs[vcpu].thread or self._calling
        assert thread is not None
        with suppress(OSError):  # it may be ending
            libc.tgkill(thread.process.pid, thread.number, number)

    def _write_contents(self) -> None:
        """Bring what clients can read without a call up to date."""
        for file, descriptor in self._readable.items():
            if descriptor.memory is not None:
                descriptor.memory[:] = file.content()

    def note_closes(self) -> None:
        """Release whatever clients have closed the last descriptor of."""
        for file in self.descriptors.closed():
            self._released(file)

    def _released(self, file: KvmFile) -> None:
        """No client can reach an object any more."""
        if isinstance(file, Vcpu):
            self._vcpu_released(file)
        elif isinstance(file, Vm):
            file.release()
        else:
            if isinstance(file, Readable):
                self._readable.pop(file, None)
            if isinstance(file, Releasable):
                file.release(self.loop.catch_up())

    def _vcpu_released(self, vcpu: Vcpu) -> None:
        run = self._runs.get(vcpu)
        now_ns = self.loop.now_ns()
        if run is not None and run.notification is not None:
            if self.listener.is_valid(run.notification[0]):
                # Linux holds the file for the time of the call.
                run.release_due = True
                return
            self._abandon(run, now_ns)
        self._runs.pop(vcpu, None)
        _release(vcpu, now_ns)

    # -- KVM_RUN ---------------------------------------------------------------------------

    def _run(self, vcpu: Vcpu, notification: Notification, thread: Thread, now_ns: int) -> bool:
        """Let a guest run; whether that takes time. If not, KVM_RUN returns 0.

        Raises:
            KvmError: it fails.
        """
        run = self._runs[vcpu]
        left: Blocked | None
        try:
            if self._code is None:  # the quick way: no call is made as often
                left = vcpu.kvm_run(now_ns)
                if type(left) is InGuest and not left.guest_ns:
                    left = vcpu.resume(now_ns)
                if left is not None:
                    left = run.pass_through(left, now_ns)
            elif self._may_enter(vcpu, notification, thread):
                left = self._run_code(run, thread, now_ns)
            else:
                return True
        except KvmError:
            raise
        except Exception:
            fail(vcpu)
            raise
        if left is None:
            if self._readable:
                self._write_contents()
            return False
        if type(left) is InGuest:
            now_ns = self.loop.catch_up()  # the guest's time counts from the timeline's present
        run.wait(left, notification, thread, now_ns)
        self.parked.add(run)
        return True

    def _run_code(self, run: Run, thread: Thread, now_ns: int) -> Blocked | None:
        """Let a guest run whose code is executed; what is left to wait for."""
        assert self._code is not None
        vcpu = run.vcpu
        if steal_time.is_wanted(vcpu):
            steal_time.waited(vcpu, thread.waited_ns())
        try:
            run.begin()
            left = vcpu.kvm_run(now_ns)
            return None if left is None else run.pass_through(left, now_ns)
        finally:
            self._code.take_back(vcpu.vm)

    def _enters_again(self, run: Run) -> bool:
        """Whether a vCPU whose code was executed enters the guest again, or is called once more."""
        notification, thread = run.notification, run.thread
        assert notification is not None
        assert thread is not None
        try:
            if self._may_enter(run.vcpu, notification, thread):
                return True
        except KvmError as error:
            run.give_up(error, self.loop.timeline.now_ns)
            return False
        run.abandon(self.loop.timeline.now_ns)
        self._leave(run)
        return False

    def _run_ended(self, run: Run, error: KvmError | None) -> None:
        """KVM_RUN returns to a client that waited for it. May be called by the timeline."""
        notification, thread = run.notification, run.thread
        assert notification is not None
        assert thread is not None
        errno = 0 if error is None else error.errno
        self._write_contents()
        if self._code is not None:
            self._code.take_back(run.vcpu.vm)
        if self._tap is not None:
            caller = thread.process
            self._tap.returned(
                run.vcpu, KVM_RUN, notification[6], caller, -errno, self.loop.timeline.now_ns
            )
        self.listener.answer(notification[0], 0, errno)
        self._leave(run)
        if run.release_due:
            self._runs.pop(run.vcpu, None)
            _release(run.vcpu, self.loop.timeline.now_ns)

    def _abandon(self, run: Run, now_ns: int) -> None:
        """The client that waited is gone."""
        try:
            run.abandon(now_ns)
        except Stuck:
            log.error("vCPU %d does not stop", run.vcpu.id)
            fail(run.vcpu)
        self._leave(run)

    def _leave(self, run: Run) -> None:
        run.finish()
        self.parked.remove(run)
        if run.waiting:
            # Not handled here: the timeline may be in the middle of something.
            self._late += run.waiting
            run.waiting.clear()
            self._late_one.set()

    def _gone(self, run: Run, now_ns: int) -> None:
        """The client that waited is gone, without a word."""
        self._abandon(run, now_ns)
        if run.release_due:
            self._vcpu_released(run.vcpu)


def _release(vcpu: Vcpu, now_ns: int) -> None:
    """A vCPU's last descriptor was closed; its page goes at once, with the descriptor behind it."""
    vcpu.release(now_ns)
    page, vcpu.run = vcpu.run, KvmRun()
    page.close()


def errno_of(error: OSError) -> int:
    """The number of an error, which Python allows to be missing."""
    return error.errno or EIO


def _is_writable(thread: Thread, fd: int) -> bool:
    """Whether a descriptor was opened for writing."""
    try:
        flags = thread.text(f"fdinfo/{fd}").partition(b"flags:")[2].split()[0]
    except (OSError, IndexError):
        return False
    return bool(int(flags, 8) & os.O_ACCMODE)
