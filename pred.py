"""Write a model's predictions on LongBench or for HELM with a full or a squeezed KV cache: `python pred.py --help`."""

import sys

from squeeze.cli.run import run_command
from squeeze.commands.pred import main

if __name__ == "__main__":
    sys.exit(run_command(main))
