"""Asks for the genres of some customers, in three ways that must give the same scores, and prints them."""

from __future__ import annotations

import argparse
import json
import random
import urllib.request
from typing import Any

CUSTOMERS = 12


def customers() -> list[dict[str, list[Any]]]:
    """Made up, the same ones every time: per customer one list of numbers for each input."""
    dice = random.Random(0)
    return [
        {"profile": [round(dice.uniform(-1, 1), 2) for _ in range(4)], "history": dice.sample(range(1000), 5)}
        for _ in range(CUSTOMERS)
    ]


def as_json(url: str, customer: dict[str, list[Any]]) -> list[float]:
    """The scores of a customer: a JSON object with a member for each input."""
    answer: list[float] = post(f"{url}/predictions/genres", json.dumps(customer).encode(), "application/json")
    return answer


def as_form(url: str, customer: dict[str, list[Any]]) -> list[float]:
    """The scores of a customer: a multipart form with a part for each input. Each says that it is JSON."""
    parts = [
        f'--frontier\r\nContent-Disposition: form-data; name="{name}"\r\nContent-Type: application/json\r\n\r\n'
        f"{json.dumps(numbers)}\r\n"
        for name, numbers in customer.items()
    ]
    body = "".join(parts) + "--frontier--\r\n"
    answer: list[float] = post(f"{url}/predictions/genres", body.encode(), "multipart/form-data; boundary=frontier")
    return answer


def as_tensors(url: str, many: list[dict[str, list[Any]]]) -> list[list[float]]:
    """The scores of many customers, asked for in one request of KServe's Open Inference Protocol (version 2)."""
    inputs = [
        {"name": name, "datatype": datatype, "shape": [len(many), size], "data": [each[name] for each in many]}
        for name, datatype, size in (("profile", "FP32", 4), ("history", "INT64", 5))
    ]
    answer = post(f"{url}/v2/models/genres/infer", json.dumps({"inputs": inputs}).encode(), "application/json")
    output = answer["outputs"][0]
    rows, columns = output["shape"]
    return [output["data"][row * columns : (row + 1) * columns] for row in range(rows)]


def post(url: str, body: bytes, content_type: str) -> Any:
    """The JSON of the answer. HTTPError if the request was refused; its body says why."""
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    url = parser.parse_args().url
    people = customers()
    together = as_tensors(url, people)
    difference = 0.0
    for number, customer in enumerate(people):
        scores = as_json(url, customer)
        print(f"customer {number}:", *(f"{score:.4f}" for score in scores))
        for others in (as_form(url, customer), together[number]):
            difference = max(difference, *(abs(a - b) for a, b in zip(scores, others, strict=True)))
    print(f"largest difference between the three ways: {difference:.6f}")


if __name__ == "__main__":
    main()
