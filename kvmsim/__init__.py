"""KVM, SEV and bus locks of an emulated confidential-computing host."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmsim.builder.open_host import open_host

__all__ = ["open_host"]


def __getattr__(name: str) -> object:
    # A command that only asks a running host does not load what a host is made of.
    if name == "open_host":
        from kvmsim.builder.open_host import open_host  # noqa: PLC0415

        return open_host
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
