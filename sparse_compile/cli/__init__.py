"""The command line: ``sparse-compile explain | code | doctor | demo``."""

from sparse_compile.cli.main import main

__all__ = ["main"]
