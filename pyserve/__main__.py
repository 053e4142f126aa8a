"""``python -m pyserve`` is ``pyserve``."""

import sys

from pyserve.commands.cli import main

sys.exit(main())
