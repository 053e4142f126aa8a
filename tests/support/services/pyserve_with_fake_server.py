"""The ``pyserve`` command with ``fake_server.py`` in the server's place."""

import sys
from pathlib import Path

from pyserve import launch
from pyserve.commands.cli import main

launch.SERVER_COMMAND[:] = [sys.executable, str(Path(__file__).with_name("fake_server.py"))]
sys.exit(main())
