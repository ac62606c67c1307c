"""KVM, SEV and bus locks of an emulated confidential-computing host."""
