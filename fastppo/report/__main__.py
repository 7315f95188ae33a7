"""`python -m fastppo.report` is `fastppo-report`."""

import sys

from fastppo.report.cli import main

if __name__ == "__main__":
    sys.exit(main())
