import sys


def handle(data, context):
    if data is None:
        return None
    sys.exit(3)
