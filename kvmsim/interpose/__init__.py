"""Unmodified KVM clients: their system calls are trapped and answered by the emulated KVM.

Works by seccomp user notification: no change to the program, no preloaded library, no kernel
module. It is an emulator for tests and not a security boundary: a client that wants to can do
whatever its own rights allow.
"""

from kvmsim.interpose.errors import CommandNotRun, Unavailable
from kvmsim.interpose.run import Emulated, run

__all__ = ["CommandNotRun", "Emulated", "Unavailable", "run"]
