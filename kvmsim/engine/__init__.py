"""Guest engines: what makes a vCPU move, and why it stops."""
