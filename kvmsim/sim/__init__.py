"""Simulation: chance, scenarios, and runs at scale."""
