"""The published name of `squeeze.helm.score`."""

import sys

from squeeze.cli.run import run_command
from squeeze.helm.score import main

if __name__ == "__main__":
    sys.exit(run_command(main))
