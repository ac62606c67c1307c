"""What happens to the guest while it is watched, one thing after another."""

from dataclasses import dataclass

#: More than any guest takes, so that QEMU asks for bus lock exits and never makes it wait.
UNLIMITED = 1_000_000_000
QEMU_RATE = 2000


@dataclass(frozen=True)
class Phase:
    """Some seconds under the same limits.

    Attributes:
        title: what the charts call it.
        ratelimit: QEMU's ``bus-lock-ratelimit``; another one than before starts QEMU anew.
        limit: what is written to ``bus_lock.max``.
        at_most: bus locks per second that the limits let through; None: no limit.
    """

    title: str
    ratelimit: int
    limit: str
    at_most: int | None


PHASES = (
    Phase("no limit", UNLIMITED, "max", None),
    Phase(f"QEMU: bus-lock-ratelimit={QEMU_RATE}", QEMU_RATE, "max", QEMU_RATE),
    Phase('besides, bus_lock.max "100 100000"', QEMU_RATE, "100 100000", 1000),
    Phase('lowered to "10 100000"', QEMU_RATE, "10 100000", 100),
)
