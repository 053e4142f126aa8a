import os
import sys


def forked(code):
    pid = os.fork()
    if pid == 0:
        sys.exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class H:
    def initialize(self, context):
        self.first = forked(3)

    def handle(self, data, context):
        return [[self.first, forked(4), forked(None)]]
