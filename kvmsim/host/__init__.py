"""The physical machine: what it is made of and what its kernel made of that."""
