"""Sends pictures and prints what each of them shows: python client.py pictures/*.png"""

from __future__ import annotations

import argparse
import json
import urllib.request
from pathlib import Path


def classify(url: str, picture: Path) -> dict[str, float]:
    """Label -> probability of the five most probable ones, the most probable first.

    Raises:
        urllib.error.HTTPError: the server refused the picture; the body says why.
    """
    request = urllib.request.Request(
        f"{url}/predictions/digits",
        data=picture.read_bytes(),
        headers={"Content-Type": "image/png"},  # without it urllib calls every body a form
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        labels: dict[str, float] = json.load(answer)
    return labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("pictures", nargs="+", type=Path)
    arguments = parser.parse_args()
    for picture in arguments.pictures:
        label, probability = next(iter(classify(arguments.url, picture).items()))
        print(f"{picture}: {label} {probability:.3f}")


if __name__ == "__main__":
    main()
