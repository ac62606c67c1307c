"""The model of the hierarchies: plain synchronous Python, without I/O, clock or randomness."""
