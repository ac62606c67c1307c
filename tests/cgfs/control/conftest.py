from sessions.session import fuse, ordinary, shell

__all__ = ["fuse", "ordinary", "shell"]
