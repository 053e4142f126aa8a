"""One case in one variant through a server: registered, asked alone and in mixed batches, judged."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.serving import Answer, Client, Server

from .asking import RAW, Strange, body, decoded, forms, shown
from .case import Case, Variant
from .judging import bound, difference, unreadable
from .packing import Packed
from .reference import Refused

CLIENTS = 12


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        lane, conversion, note: what describe says; the note is about batches.
        wrong: one line per answer 200 that is wrong, or per error whose text no client should read.
        refusal: the text with which registration was refused.
        errors: texts of requests that were answered with an error.
        answered: right answers.
        largest: of their `difference`.
        batch: the largest batch that ran.
    """

    case: Case
    variant: Variant
    lane: str = ""
    conversion: str = ""
    note: str = ""
    wrong: list[str] = field(default_factory=list)
    refusal: str = ""
    errors: list[str] = field(default_factory=list)
    answered: int = 0
    largest: float = 0.0
    batch: int = 0


@dataclass(frozen=True)
class Question:
    number: int
    form: str
    body: bytes
    right: Any


class Trial:
    """Runs with `run`; leaves the server without the model."""

    def __init__(self, server: Server, packed: Packed, variant: Variant):
        self.server, self.packed, self.case, self.variant = server, packed, packed.case, variant
        self.name = f"{self.case.name}-{variant}"
        self.outcome = Outcome(self.case, variant)
        self._lock = threading.Lock()
        self._seen: dict[int, bytes] = {}

    def run(self) -> Outcome:
        archive = self.packed.archive(self.variant, self.name, self.server.store)
        try:
            if self._register():
                self._ask_all()
                self._describe()
                self.server.ask("DELETE", f"/models/{self.name}", port="management")
        finally:
            Path(archive).unlink(missing_ok=True)
        return self.outcome

    def _register(self) -> bool:
        query = f"url={self.name}.mar&initial_workers={self.variant.workers[0]}&synchronous=true"
        answer = self.server.ask("POST", f"/models?{query}", port="management")
        if answer.status == 200:
            return True
        self.outcome.refusal = _text(answer)
        self._check_text(self.outcome.refusal, "registration")
        return False

    def _ask_all(self) -> None:
        questions = self._questions()
        for round_, workers in enumerate(self.variant.workers):
            if round_:
                query = f"min_worker={workers}&max_worker={workers}&synchronous=true"
                self.server.ask("PUT", f"/models/{self.name}?{query}", port="management")
            where = f"{workers} worker{'s' * (workers > 1)}"
            with self.server.client() as client:
                for question in questions:
                    self._ask(client, question, f"alone, {where}")
            self._ask_mixed(questions, where)

    def _questions(self) -> list[Question]:
        pairs = zip(self.case.requests(), self.packed.right_answers, strict=True)
        return [
            Question(number, form, body(self.case, item, form), right)
            for number, (item, right) in enumerate(pairs)
            for form in forms(self.case, item, right)
        ]

    def _ask_mixed(self, questions: list[Question], where: str) -> None:
        # Several rounds of all, in another order each, so that each meets others in its batch.
        rounds = -(-self.case.mixed // max(len(questions), 1))
        mixed = [question for i in range(rounds) for question in questions[i % 5 :: 1] + questions[: i % 5]]
        lanes = [mixed[i::CLIENTS] for i in range(CLIENTS)]

        def ask(part: list[Question]) -> None:
            with self.server.client() as client:
                for question in part:
                    self._ask(client, question, f"mixed, {where}")

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(ask, lanes))

    def _ask(self, client: Client, question: Question, where: str) -> None:
        # An answer in kind: raw to raw, JSON to JSON.
        headers = {"Content-Type": question.form, "Accept": question.form}
        answer = client.ask("POST", f"/predictions/{self.name}", question.body, headers)
        form = "raw" if question.form == RAW else "JSON"
        with self._lock:
            self._judge(answer, question, f"request {question.number} {form} {where}")

    def _judge(self, answer: Answer, question: Question, where: str) -> None:
        right = question.right
        if answer.status != 200:
            text = _text(answer)
            self._check_text(text, where)
            if not isinstance(right, Refused):
                self.outcome.errors.append(f"{where}: {answer.status} {text}")
            return
        if isinstance(right, Refused):
            self.outcome.wrong.append(f"{where}: answered {answer.body[:60]!r}; right is an error ({right.reason})")
            return
        try:
            got = decoded(answer.body, answer.headers, right)
        except Strange as error:
            self.outcome.wrong.append(f"{where}: {error}; right is {shown(right)}")
            return
        if self.case.likely is not None:
            self._judge_draw(answer, question, got, where)
            return
        worst = difference(right, got)
        if worst > self._bound(right):
            self.outcome.wrong.append(f"{where}: off by {worst:.1e}: {shown(got)}; right is {shown(right)}")
            return
        self.outcome.answered += 1
        self.outcome.largest = max(self.outcome.largest, worst)

    def _bound(self, right: Any) -> float:
        usual = bound(right, self.variant.precision)
        return usual if self.case.rounding is None else max(usual, self.case.rounding)

    def _judge_draw(self, answer: Answer, question: Question, got: Any, where: str) -> None:
        assert self.case.likely is not None
        problem = self.case.likely(self.case.requests()[question.number], got)
        is_zero = all(not bool(each.any()) for each in self.case.requests()[question.number])
        if not problem and self.case.varies and not is_zero and question.form == RAW:
            if self._seen.get(question.number) == answer.body:
                problem = "the same draw as in the last answer"
            self._seen[question.number] = answer.body
        if problem:
            self.outcome.wrong.append(f"{where}: {problem}: {shown(got)}")
        else:
            self.outcome.answered += 1

    def _check_text(self, text: str, where: str) -> None:
        odd = unreadable(text)
        if odd:
            self.outcome.wrong.append(f"{where}: an error no client should read ({odd!r}): {text[:300]}")

    def _describe(self) -> None:
        described = self.server.describe(self.name)
        self.outcome.lane = described.get("lane", "")
        checks = described.get("checks", {})
        how = re.search(r"traced|scripted|exported", str(checks.get("conversion", "")))
        self.outcome.conversion = how.group() if how else ""
        self.outcome.note = str(checks.get("batchNote", ""))
        sizes = [int(size) for size in described.get("batchSizeHistogram", {}) if size.isdigit()]
        self.outcome.batch = max(sizes, default=0)


def _text(answer: Answer) -> str:
    """An error's message with its detail."""
    try:
        told = json.loads(answer.body)
    except ValueError:
        return answer.body.decode("utf-8", "replace")
    detail = told.get("detail") or {}
    extra = str(detail.get("text", "")) if isinstance(detail, dict) else str(detail)
    message = str(told.get("message", told))
    return message if extra in message else f"{message} {extra}"
