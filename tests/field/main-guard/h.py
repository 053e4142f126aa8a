import sys


def handle(data, context):
    return None if data is None else [__name__] * len(data)


if __name__ == "__main__":
    sys.exit("run by hand")
