"""Whether a thread has a signal to handle.

A thread whose call was received waits killably: signals do not wake it, so that no call is broken
off after its effect. KVM_RUN has to return EINTR for one all the same, so the threads that wait in
it are looked at from time to time.
"""

from __future__ import annotations

_SIGNALS = (1 << 64) - 1


def pending(status: bytes, blocked: int | None = None) -> bool:
    """Whether a signal that is not blocked waits for a thread.

    Args:
        status: text of the thread's /proc/TID/status.
        blocked: mask that holds instead of the thread's own (KVM_SET_SIGNAL_MASK); bit 0 is
            signal 1.
    """
    mask = _field(status, b"SigBlk:") if blocked is None else blocked
    waiting = _field(status, b"SigPnd:") | _field(status, b"ShdPnd:")
    return bool(waiting & ~mask & _SIGNALS)


def _field(status: bytes, name: bytes) -> int:
    _, found, rest = status.partition(b"\n" + name)
    return int(rest.split(None, 1)[0], 16) if found else 0
