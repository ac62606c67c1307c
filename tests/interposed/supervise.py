"""Runs a program on a host of its own: ``python supervise.py PROGRAM ARGUMENTS``."""

import sys

from cgfs.controllers.misc import CONTROLLER
from cgfs.core.roots import Roots
from kvmsim.host.accounting import CgroupAccounting
from kvmsim.host.machine import Machine
from kvmsim.host.presets import load
from kvmsim.interpose import Emulated, Unavailable, run
from kvmsim.kvm.system import System

if __name__ == "__main__":
    roots = Roots([CONTROLLER])
    system = System(Machine(load("naples15"), roots, CgroupAccounting(roots)))
    try:
        sys.exit(run(sys.argv[1:], Emulated(system)))
    except Unavailable as error:
        sys.exit(f"unavailable: {error}")
