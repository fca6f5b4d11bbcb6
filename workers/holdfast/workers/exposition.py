"""Metrics as data, as JSON and as the text that Prometheus reads (format 0.0.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec

Kind = Literal["gauge", "counter"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_LABEL_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_HELP_ESCAPES: Final = str.maketrans({"\\": r"\\", "\n": r"\n"})


class Sample(msgspec.Struct, frozen=True):
    """One value with the labels that tell it from the others of its metric."""

    value: float
    labels: dict[str, str] = {}


class Metric(msgspec.Struct, frozen=True):
    """A metric: its name with its unit, what it says, and its values.  A counter begins anew with its process."""

    name: str
    kind: Kind
    help: str
    samples: list[Sample]


def render_text(metrics: Iterable[Metric]) -> str:
    """Returns metrics as Prometheus reads them; one without a value is left out."""
    lines: list[str] = []
    for metric in metrics:
        if not metric.samples:
            continue
        lines.append(f"# HELP {metric.name} {metric.help.translate(_HELP_ESCAPES)}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        lines += [f"{metric.name}{_labels(sample.labels)} {_number(sample.value)}" for sample in metric.samples]
    return "\n".join(lines) + "\n"


def render_json(metrics: Iterable[Metric]) -> list[dict[str, Any]]:
    """Returns metrics as JSON can hold them: ``[{"name", "kind", "help", "samples": [{"labels", "value"}]}]``."""
    return [
        {
            "name": metric.name,
            "kind": metric.kind,
            "help": metric.help,
            "samples": [{"labels": sample.labels, "value": sample.value} for sample in metric.samples],
        }
        for metric in metrics
        if metric.samples
    ]


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{value.translate(_LABEL_ESCAPES)}"' for name, value in labels.items()) + "}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))
