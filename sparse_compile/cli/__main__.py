"""``python -m sparse_compile.cli`` is ``sparse-compile``."""

import sys

from sparse_compile.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
