"""How commands talk to a running mount: runtime directory, socket, messages, daemon start."""
