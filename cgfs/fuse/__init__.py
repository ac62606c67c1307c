"""The file system: a `cgfs.views.tree.Tree` served through FUSE.

This package is the only importer of pyfuse3. `cgfs.fuse.mount.mounted` is the way in.
"""
