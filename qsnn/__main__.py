"""``python -m qsnn``, which torchrun also calls."""

from qsnn.cli import main

main()
