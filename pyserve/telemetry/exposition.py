"""Families of metrics in Prometheus' text form, version 0.0.4, written as TorchServe writes it.

TorchServe puts a comma after the last label too, and numbers as Java prints them. prometheus_client's own writer would
also rename its counters, which do not end in ``_total``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from itertools import accumulate

from prometheus_client.metrics_core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Families with this text have samples named like the family; of all others counters get "_total", as Prometheus'
# rules want.
_TORCHSERVE_HELP = "Torchserve prometheus "
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})


def torchserve_family(name: str, kind: str, unit: str) -> Metric:
    """A family with TorchServe's words. ``kind``: ``counter``, ``gauge`` or ``histogram``."""
    return Metric(name, f"{_TORCHSERVE_HELP}{kind} metric with unit: {unit}", kind)


def number_text(value: float) -> str:
    """As Java prints a double: ``8.0``, ``1.0E7``."""
    number = float(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "+Inf" if number > 0 else "-Inf"
    if number == 0 or 1e-3 <= abs(number) < 1e7:
        return repr(number)
    sign, digits, exponent = Decimal(repr(number)).as_tuple()
    text = "".join(map(str, digits)).rstrip("0")
    assert isinstance(exponent, int)
    return f"{'-' if sign else ''}{text[0]}.{text[1:] or '0'}E{exponent + len(digits) - 1}"


def add_histogram(
    family: Metric, labels: Mapping[str, str], bounds: Iterable[float], counts: Iterable[int], total: float
) -> None:
    """Adds the samples of a histogram; ``counts`` are not cumulative, the last one of what is above all ``bounds``."""
    cumulative = list(accumulate(counts))
    for bound, count in zip((*bounds, math.inf), cumulative, strict=True):
        family.add_sample(f"{family.name}_bucket", {**labels, "le": number_text(bound)}, count)
    family.add_sample(f"{family.name}_count", dict(labels), cumulative[-1])
    family.add_sample(f"{family.name}_sum", dict(labels), total)


def render(families: Iterable[Metric], names: Iterable[str] = ()) -> bytes:
    """All samples, or those whose names are exactly one of ``names``."""
    wanted = frozenset(names)
    return "".join(line for family in families for line in _lines(family, wanted)).encode()


def _lines(family: Metric, wanted: frozenset[str]) -> Iterator[str]:
    samples = [sample for sample in family.samples if not wanted or sample.name in wanted]
    if wanted and not samples:
        return
    name = family.name
    if family.type == "counter" and not family.documentation.startswith(_TORCHSERVE_HELP):
        name += "_total"
    about = family.documentation.replace("\\", "\\\\").replace("\n", "\\n")
    yield f"# HELP {name} {about}\n# TYPE {name} {family.type}\n"
    for sample in samples:
        labels = "".join(f'{label}="{value.translate(_ESCAPES)}",' for label, value in sample.labels.items())
        yield f"{sample.name}{{{labels}}} " if labels else f"{sample.name} "
        yield f"{number_text(sample.value)}\n"
