import sys

from squeeze.bench.command import main
from squeeze.cli.run import run_command

sys.exit(run_command(main))
