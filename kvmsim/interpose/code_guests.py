"""The VMs of clients whose guests execute code: memory, emulator and executor of each."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from kvmsim.interpose.executor import Executor, Stuck, Watchdog
from kvmsim.interpose.guest_memory import GuestMemory
from kvmsim.kvm.x86.guest import CodeGuests

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, MutableMapping

    from kvmsim.interpose.clients import Thread
    from kvmsim.interpose.remap import Remap
    from kvmsim.kvm.vcpu import Vcpu
    from kvmsim.kvm.vm import Vm
    from kvmsim.kvm.x86.guest import NotEntered
    from kvmsim.vmm.run_loop import RunLoop

log = logging.getLogger(__name__)

SWITCH_S: Final = 0.0001
"""How long a thread may keep Python to itself. A guest whose code calls back a million times a
second wins each race for it; by default the event loop would wait five milliseconds every time."""


class CodeVm:
    """One VM whose guest executes code.

    Args:
        vm: the VM.
        loop: time of the host.
        watchdog: for code that is executed on the event loop.
        shared: see ``GuestMemory``.

    Attributes:
        memory: its memory.
        executor: executes what does not stop soon.
    """

    __slots__ = ("_loop", "executor", "memory")

    def __init__(
        self, vm: Vm, loop: RunLoop, watchdog: Watchdog, shared: MutableMapping[int, mmap.mmap]
    ) -> None:
        self.memory = GuestMemory(vm, shared)
        self.executor = Executor(loop, watchdog, self.bring, self._after)
        self._loop = loop

    def bring(self) -> None:
        """Guest code is about to execute."""
        if self.memory.is_copied and not self.executor.is_executing:
            self.memory.bring()

    def take_back(self) -> None:
        """The client is about to look."""
        if self.memory.is_copied:
            self.memory.take_back(executing=self.executor.is_executing)

    def _after(self) -> None:
        self._loop.catch_up()
        self.take_back()


class CodeVms:
    """All of them.

    Args:
        loop: time of the host.
    """

    def __init__(self, loop: RunLoop) -> None:
        self._loop = loop
        self._guests = CodeGuests(
            inline_bytes=0,
            paced=False,
            clock_ns=loop.now_ns,
            on_missing=_say,
        )
        self._vms: dict[Vm, CodeVm] = {}
        self._shared: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
        self._watchdog = Watchdog()
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)

    def engine(self, vcpu: Vcpu) -> NotEntered:
        """The engine of a new vCPU."""
        return self._guests(vcpu)

    def of(self, vm: Vm) -> CodeVm:
        """What belongs to a VM."""
        found = self._vms.get(vm)
        if found is None:
            found = self._vms[vm] = CodeVm(vm, self._loop, self._watchdog, self._shared)
        return found

    def pause(self, vm: Vm) -> None:
        """Let no code of a VM execute until the caller goes back to the event loop.

        Raises:
            Stuck: it does not stop.
        """
        found = self._vms.get(vm)
        if found is not None:
            found.executor.pause()

    def take_back(self, vm: Vm) -> None:
        """A client is about to look at the memory of its VM."""
        found = self._vms.get(vm)
        if found is not None:
            found.take_back()

    def may_enter(self, vcpu: Vcpu, thread: Thread, remap: Callable[[], Remap]) -> bool:
        """Get memory ready for a vCPU that is about to enter the guest.

        Args:
            vcpu: the vCPU.
            thread: whose KVM_RUN it is.
            remap: makes what replaces the client's private pages.

        Returns:
            Whether the call still waits for its answer; if not, it is being made again.

        Raises:
            Stuck: other vCPUs do not stop.
            OSError: the client is gone.
        """
        vm = vcpu.vm
        guest = self.of(vm)
        memory = guest.memory
        if not memory.is_current:
            guest.executor.pause()
            guest.take_back()
            replace = remap()
            found = memory.update(
                thread.process.pid, lambda: thread.text("maps").decode(errors="replace"), replace
            )
            if found:
                self._guests.memory_changed(vm)
            if replace.answered:
                return False
        guest.bring()
        return True

    def close(self) -> None:
        """End all threads."""
        for vm in list(self._vms):
            self.ended(vm)
        self._watchdog.close()
        sys.setswitchinterval(self._switch_s)

    def ended(self, vm: Vm) -> None:
        """A VM is no more."""
        guest = self._vms.pop(vm, None)
        if guest is None:
            return
        try:
            guest.executor.pause()
        except Stuck:
            # The thread is in there, so nothing of it can be freed.
            log.error("a guest does not stop; its memory is kept until the client ends")
            return
        guest.executor.close()
        self._guests.ended(vm)
        guest.memory.close()


def _say(line: str) -> None:
    print(f"kvmsim: {line}; KVM_RUN fails", file=sys.stderr, flush=True)  # noqa: T201 - for people
