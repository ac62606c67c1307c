"""What can be asked of a running host, and how its answers look."""
