import sys

from squeeze.report.command import main

sys.exit(main())
