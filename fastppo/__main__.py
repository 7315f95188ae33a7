"""`python -m fastppo` is `fastppo-train`."""

import sys

from fastppo.cli import main

if __name__ == "__main__":
    sys.exit(main())
