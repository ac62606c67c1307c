"""``tools/demo --guest x86``: a storm of bus locks in QEMU, and what limits do to it."""
