import sys

from squeeze.sweep.command import main

sys.exit(main())
