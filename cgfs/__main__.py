"""``python -m cgfs``."""

from cgfs.cli import main

main()
