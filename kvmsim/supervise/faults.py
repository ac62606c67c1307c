r"""Calls that fail on purpose, so that a VMM's error paths can be tested.

Lines of a script file (:mod:`kvmsim.supervise.script`)::

    fail KVM_CREATE_VM 3 ENOMEM             the third call
    fail KVM_RUN 10+ EFAULT                 the tenth and all after it
    fail KVM_SEV_LAUNCH_START 1 firmware=7  EIO, with the firmware's error 7 in kvm_sev_cmd.error
    no-asids                                every init command: EBUSY
    no-asids 3+                             from the third on

Calls are counted over the whole client tree, for each line by itself, whether they succeed or not.
A call that is made to fail changes nothing and looks at no argument.
"""

from __future__ import annotations

import errno as errno_names
import re
from dataclasses import dataclass
from errno import EBUSY, EIO
from typing import TYPE_CHECKING

from kvmsim.abi import ioctls, sev
from kvmsim.errors import ConfigError, KvmError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmsim.kvm.client import Client
    from kvmsim.kvm.dispatch import KvmFile

_REQUESTS = {**ioctls.SYSTEM, **ioctls.VM, **ioctls.VCPU}
_INITS = frozenset({sev.KVM_SEV_INIT, sev.KVM_SEV_ES_INIT, sev.KVM_SEV_INIT2})
_WHICH = re.compile(r"([1-9][0-9]{0,8})(\+?)")
_FIRMWARE = re.compile(r"firmware=(0x[0-9a-fA-F]{1,8}|[0-9]{1,9})")

WORDS = ("fail", "no-asids")


@dataclass(slots=True)
class Fault:
    """A call that is to fail.

    Attributes:
        request: of the ioctl.
        commands: of ``KVM_MEMORY_ENCRYPT_OP`` it concerns; empty for other ioctls.
        first: number of the first call that fails, from 1.
        onwards: whether those after it fail as well.
        errno: what the call fails with.
        firmware: what goes to ``kvm_sev_cmd.error``; None leaves that alone.
        calls: how many there were.
    """

    request: int
    commands: frozenset[int]
    first: int
    onwards: bool
    errno: int
    firmware: int | None = None
    calls: int = 0

    def strikes(self) -> bool:
        """Count a call; whether it is one that fails."""
        self.calls += 1
        return self.calls == self.first or (self.onwards and self.calls > self.first)


class Faults:
    """All faults of a script; a tap of the supervisor.

    Args:
        faults: in the order of the script. All count a call, the first that strikes decides.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._by_request: dict[int, list[Fault]] = {}
        for fault in faults:
            self._by_request.setdefault(fault.request, []).append(fault)

    def called(self, file: KvmFile, request: int, arg: int, caller: Client) -> int | None:
        """With what a call is to fail; None: it is not to."""
        del file
        faults = self._by_request.get(request)
        if faults is None:
            return None
        command: int | None = None
        if request == ioctls.KVM_MEMORY_ENCRYPT_OP:
            command = _command(arg, caller)
        striking = [
            fault
            for fault in faults
            if (not fault.commands or command in fault.commands) and fault.strikes()
        ]
        if not striking:
            return None
        if striking[0].firmware is not None:
            error = striking[0].firmware.to_bytes(4, "little")
            try:
                caller.write(arg + sev.KVM_SEV_CMD.fields["error"].offset, error)
            except KvmError as unwritable:
                return unwritable.errno
        return striking[0].errno

    def returned(
        self, file: KvmFile, request: int, arg: int, caller: Client, result: int, now_ns: int
    ) -> None:
        """Nothing: a call counts when it is made."""


def parse(words: Sequence[str]) -> Fault:
    """Read one line.

    Args:
        words: of the line; the first is one of :data:`WORDS`.

    Raises:
        ConfigError: it is no fault; the message has no place in it.
    """
    if words[0] == "no-asids":
        if len(words) > 2:
            raise ConfigError('"no-asids" takes at most one word, such as 3 or 3+')
        first, onwards = _which(words[1]) if len(words) == 2 else (1, True)
        return Fault(ioctls.KVM_MEMORY_ENCRYPT_OP, _INITS, first, onwards, EBUSY)
    if len(words) != 4:
        raise ConfigError('"fail" takes an ioctl, which call, and an errno')
    _, name, which, outcome = words
    first, onwards = _which(which)
    found = _FIRMWARE.fullmatch(outcome)
    if found is not None and name not in sev.COMMANDS:
        raise ConfigError(f"{name} is no command of the firmware")
    firmware = int(found[1], 0) if found is not None else None
    errno = EIO if found is not None else _errno(outcome)
    if name in sev.COMMANDS:
        commands = frozenset({sev.COMMANDS[name]})
        return Fault(ioctls.KVM_MEMORY_ENCRYPT_OP, commands, first, onwards, errno, firmware)
    if name not in _REQUESTS:
        raise ConfigError(f'"{name}" is no ioctl of KVM and no SEV command')
    return Fault(_REQUESTS[name], frozenset(), first, onwards, errno)


def _which(text: str) -> tuple[int, bool]:
    found = _WHICH.fullmatch(text)
    if found is None:
        raise ConfigError(f'"{text}" does not say which call (such as 3, or 3+ for all from there)')
    return int(found[1]), bool(found[2])


def _errno(text: str) -> int:
    number = getattr(errno_names, text, None) if text.startswith("E") else None
    if not isinstance(number, int):
        raise ConfigError(f'"{text}" is not an errno (such as ENOMEM)')
    return number


def _command(arg: int, client: Client) -> int | None:
    try:
        data = client.read(arg, sev.KVM_SEV_CMD.size_bytes)
    except KvmError:
        return None
    return sev.KVM_SEV_CMD.get(data, "id")
