"""Descriptors that keep a VM alive beside its own and those of its vCPUs."""

from __future__ import annotations

from errno import ENOTTY
from typing import TYPE_CHECKING

from kvmsim.kvm.dispatch import KvmFile

if TYPE_CHECKING:
    from kvmsim.kvm.client import Client
    from kvmsim.kvm.vm import Vm


class VmHolder(KvmFile):
    """A file made by a VM that holds a reference to it until it is closed.

    Args:
        vm: which.

    Attributes:
        vm: as given.
    """

    __slots__ = ("vm",)
    UNKNOWN_ERRNO = ENOTTY

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        vm.get()
        vm.holders[self] = None

    @property
    def creator(self) -> Client:
        """Who made the VM."""
        return self.vm.creator

    def release(self, now_ns: int = 0) -> None:
        """The last descriptor of it was closed."""
        del now_ns
        if self in self.vm.holders:
            del self.vm.holders[self]
            self.vm.put()
