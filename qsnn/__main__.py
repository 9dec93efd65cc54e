"""``python -m qsnn``, which torchrun also calls."""

from qsnn.cli.main import main

main()
