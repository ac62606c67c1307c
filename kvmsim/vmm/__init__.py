"""The in-process VMM: vCPU threads on a timeline, and the trio task that drives it."""
