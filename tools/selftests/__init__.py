"""Linux's KVM selftests: built from Debian's kernel source, run, compared with a list."""
