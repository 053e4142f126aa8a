"""How often so many bytes go to another process and come back, over TCP on this machine and with nothing else done.

    python bench/sockets.py --size 1048576 --clients 8 --duration 5

Both ends call recv_into and sendall on memory they keep, one thread per connection. Four copies of the bytes are the
kernel's, into and out of a socket, there and back. Prints round trips per second.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
import time


def receive(sock: socket.socket, place: memoryview) -> bool:
    """Fills ``place``; False if the other end has closed before."""
    got = 0
    while got < len(place):
        size = sock.recv_into(place[got:])
        if size == 0:
            return False
        got += size
    return True


def echo(sock: socket.socket, size: int) -> None:
    place = memoryview(bytearray(size))
    while receive(sock, place):
        sock.sendall(place)


def ask(address: tuple[str, int], size: int, until: float, counts: list[int]) -> None:
    body, place, count = bytes(size), memoryview(bytearray(size)), 0
    with socket.create_connection(address) as sock:
        while time.monotonic() < until:
            sock.sendall(body)
            if not receive(sock, place):
                raise ConnectionError("the other process has closed the connection")
            count += 1
    counts.append(count)


def serve(listener: socket.socket, size: int) -> None:
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=echo, args=(sock, size), daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1 << 20, help="bytes there, and as many back (default: 1 MB)")
    parser.add_argument("--clients", type=int, default=1, help="connections at once (default: 1)")
    parser.add_argument("--duration", type=float, default=5, help="seconds (default: 5)")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        serve(listener, options.size)
    try:
        began = time.monotonic()
        counts: list[int] = []
        asking = (listener.getsockname(), options.size, began + options.duration, counts)
        threads = [threading.Thread(target=ask, args=asking) for _ in range(options.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"{sum(counts) / (time.monotonic() - began):.2f}")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
