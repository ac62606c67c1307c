"""``python -m kvmsim``."""

from kvmsim.cli import main

main()
