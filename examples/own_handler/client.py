"""Asks for the species of some irises, one of them without petals, and prints the answers."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from typing import Any

FLOWERS = [
    {"sepal_length": 5.0, "sepal_width": 3.4, "petal_length": 1.5, "petal_width": 0.2},
    {"sepal_length": 5.9, "sepal_width": 2.8, "petal_length": 4.3, "petal_width": 1.3},
    {"sepal_length": 6.6, "sepal_width": 3.0, "petal_length": 5.6, "petal_width": 2.1},
    {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 0, "petal_width": 0.3},
    {"sepal_length": 5.1, "sepal_width": 3.5, "petal_width": 0.3},
]


def ask(url: str, flower: dict[str, float]) -> tuple[int, Any]:
    """Status and JSON of the answer, also of a refusal."""
    request = urllib.request.Request(
        f"{url}/predictions/iris", json.dumps(flower).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    arguments = parser.parse_args()
    for flower in FLOWERS:
        status, answer = ask(arguments.url, flower)
        if status == 200:
            print(f"{status} {answer['species']}, {answer['probability']:.2f} sure")
        else:
            print(f"{status} {answer['type']}: {answer['message']}")


if __name__ == "__main__":
    main()
