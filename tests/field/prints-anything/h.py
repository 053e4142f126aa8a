import sys


def handle(data, context):
    if data is None:
        return None
    print("[METRICS]broken")
    print("x" * 100000)
    sys.stdout.buffer.write(bytes([0, 255, 254]) + b"no newline")
    sys.stdout.flush()
    print("Torch worker started.")
    sys.stderr.write("to stderr")
    return ["ok"] * len(data)
