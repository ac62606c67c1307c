"""A client's supervisor: its connection to the host, scripts, faults and traces around its KVM."""
