"""`python -m zoo`: the command line, for launchers that start Python modules."""

import sys

from zoo.cli import main

sys.exit(main(sys.argv[1:]))
