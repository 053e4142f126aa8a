"""Asks for one temperature after the other, in four threads, until version 2.0 has answered for a while.

Prints how many answers each version gave, and how many requests failed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import threading
import time
from collections import Counter
from urllib.parse import urlsplit

THREADS = 4
ENOUGH = 200  # answers of version 2.0 that each thread waits for
LIMIT_S = 60.0  # and for how long, where it never comes
FAILURES_MAX = 10  # of a thread, which then gives up


def version_of(celsius: float, fahrenheit: float) -> str:
    """Which version's answer it is: they differ for all temperatures but 10 degrees."""
    if abs(fahrenheit - (2 * celsius + 30)) < 1e-3:
        return "1.0"
    if abs(fahrenheit - (1.8 * celsius + 32)) < 1e-3:
        return "2.0"
    return "neither"


class Asker(threading.Thread):
    """One client with a connection that it keeps.

    Attributes:
        answers: of each version, or "failed" or "neither".
        went_back: whether version 1.0 answered a request that was sent after 2.0 had answered one.
    """

    def __init__(self, address: str, seed: int):
        super().__init__()
        self.answers: Counter[str] = Counter()
        self.went_back = False
        self._address = address
        self._dice = random.Random(seed)

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=LIMIT_S)
        end = time.monotonic() + LIMIT_S
        while self.answers["2.0"] < ENOUGH and self.answers["failed"] < FAILURES_MAX and time.monotonic() < end:
            answer = self._ask(connection)
            self.went_back |= answer == "1.0" and self.answers["2.0"] > 0
            self.answers[answer] += 1
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> str:
        celsius = self._dice.randint(11, 100)
        headers = {"Content-Type": "application/json"}
        try:
            connection.request("POST", "/predictions/fahrenheit", json.dumps([celsius]), headers)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            print(f"failed: {error!r}")
            connection.close()  # the next request opens it again
            return "failed"
        if answer.status != 200:
            print(f"failed: {answer.status} {body.decode()}")
            return "failed"
        return version_of(celsius, json.loads(body)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    url = parser.parse_args().url
    askers = [Asker(urlsplit(url).netloc, seed) for seed in range(THREADS)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    answers = sum((asker.answers for asker in askers), Counter())
    print(f"answers of version 1.0: {answers['1.0']}")
    print(f"answers of version 2.0: {answers['2.0']}")
    print(f"wrong answers: {answers['neither']}")
    print(f"failed requests: {answers['failed']}")
    print(f"threads that saw 1.0 again after 2.0: {sum(asker.went_back for asker in askers)}")


if __name__ == "__main__":
    main()
