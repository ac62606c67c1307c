"""Puts a machine together: preset, cgroups, KVM, time, and the edges that people use."""
