"""Asks for each review alone, then for all at once, and prints how good they are; both answers must be the same."""

from __future__ import annotations

import argparse
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

REVIEWS = [
    "soup good",
    "the bread was fresh",
    "the coffee was not cold",
    "lovely service",
    "the cake was salty",
    "slow",
    "i came here for the soup and it was bad",
    "i came here for the bread and it was lovely",
    "we came late but the coffee that we had was really very good and we told everybody that we know",
    "we came late but the service that we had was really very rude and we told everybody that we know",
]


def ask(url: str, review: str) -> tuple[float, int]:
    """How good a review is, from 0 to 1, and how many reviews shared its batch."""
    request = urllib.request.Request(
        f"{url}/predictions/reviews", review.encode(), {"Content-Type": "text/plain", "x-server-timing": "1"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        size = re.search(r"size=(\d+)", answer.headers["Server-Timing"])
        return json.load(answer)["good"], int(size[1]) if size else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    url = parser.parse_args().url
    alone = [ask(url, review) for review in REVIEWS]
    with ThreadPoolExecutor(len(REVIEWS)) as clients:
        together = list(clients.map(lambda review: ask(url, review), REVIEWS))
    for review, (good, size), (again, sharers) in zip(REVIEWS, alone, together, strict=True):
        print(f"{good:.3f} in a batch of {size}, {again:.3f} in a batch of {sharers}: {review}")
    print(f"largest difference: {max(abs(one[0] - other[0]) for one, other in zip(alone, together, strict=True)):.6f}")


if __name__ == "__main__":
    main()
