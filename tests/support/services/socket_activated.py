"""Becomes the command in its arguments, which finds a socket as a service manager passes it.

socket_activated.py NAME DESCRIPTOR COMMAND...
"""

import os
import sys

_, name, descriptor, *command = sys.argv
os.dup2(int(descriptor), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": name}
os.execv(command[0], command)
