"""Check that this environment can run models with a KV budget per layer: `python modify_transformers.py`."""

import sys

from squeeze.commands.check import main

if __name__ == "__main__":
    sys.exit(main())
