"""Prints the words of a story when they arrive: python client.py a server"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator


def story(url: str, prompt: str, count: int) -> Iterator[str]:
    """The parts of the answer, each when it arrives. HTTPError if the request is refused; its body says why."""
    body = json.dumps({"prompt": prompt, "count": count}).encode()
    request = urllib.request.Request(f"{url}/predictions/story", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        while part := answer.read1():  # what is there, where read() would wait for the end
            yield part.decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--count", type=int, default=20, help="of words")
    parser.add_argument("--times", action="store_true", help="one part per line, with its time of arrival")
    parser.add_argument("prompt", nargs="+")
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        for part in story(arguments.url, " ".join(arguments.prompt), arguments.count):
            if arguments.times:
                print(f"{(time.monotonic() - start) * 1000:5.0f} ms: {part.strip()}", flush=True)
            else:
                print(part, end="", flush=True)
    except urllib.error.HTTPError as error:
        print(f"{error.code} {json.load(error)['message']}")


if __name__ == "__main__":
    main()
