"""Score a run's predictions with LongBench's own metrics: `python eval.py --help`."""

import sys

from squeeze.cli.run import run_command
from squeeze.commands.eval import main

if __name__ == "__main__":
    sys.exit(run_command(main))
