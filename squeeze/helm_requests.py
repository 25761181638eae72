"""The published name of `squeeze.helm.requests`."""

import sys

from squeeze.cli.run import run_command
from squeeze.helm.requests import main

if __name__ == "__main__":
    sys.exit(run_command(main))
