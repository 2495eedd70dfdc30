"""`python -m prefuse.engine` is `prefuse`."""

import sys

from prefuse.engine.cli import main

sys.exit(main())
