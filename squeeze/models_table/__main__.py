import sys

from squeeze.cli.run import run_command
from squeeze.models_table.command import main

sys.exit(run_command(main))
