"""Real processes of the machine as members of cgroups: the edge between the model and /proc."""

from cgfs.procs.choose import open_processes
from cgfs.procs.processes import RealProcesses
from cgfs.procs.release_agent import ReleaseAgent
from cgfs.procs.watch import run

__all__ = ["RealProcesses", "ReleaseAgent", "open_processes", "run"]
