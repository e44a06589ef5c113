"""`python -m beamline_eval` is `beamline-eval`, for use from a clone without installing."""

import sys

from beamline_eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
