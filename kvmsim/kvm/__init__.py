"""KVM: system, VM and vCPU objects whose calls carry the real numbers, structures and errnos."""
