"""The published name of `squeeze.benchmarks.longbench.download`."""

import sys

from squeeze.benchmarks.longbench.download import main
from squeeze.cli.run import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
