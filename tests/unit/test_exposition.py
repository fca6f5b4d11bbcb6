"""Metrics in the text format of Prometheus, read back by an independent reading of its grammar."""

from __future__ import annotations

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from holdfast.workers.exposition import Metric, Sample, render_json, render_text
from tests.support import examples

# The format's grammar for a sample: name, labels in braces with \\, \" and \n escaped, value.
SAMPLE = re.compile(r'([a-z_:][a-z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\n"])*",?)*)\})? (\S+)\Z')
UNESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\[\\n"])*)"')


def read(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The samples of a text, by metric."""
    assert text.endswith("\n")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# "):
            assert re.match(r"# (HELP|TYPE) [a-z_]+ .+", line), line
            continue
        match = SAMPLE.match(line)
        assert match is not None, line
        labels = {
            name: re.sub(r'\\[\\n"]', lambda escape: UNESCAPED[escape[0]], value)
            for name, value in LABEL.findall(match[2] or "")
        }
        found.setdefault(match[1], []).append((labels, float(match[3])))
    return found


@examples(100)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(["stream", "table", "process"]), st.text(max_size=12)),
            st.one_of(st.integers(-(2**52), 2**52), st.floats(allow_nan=False)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_written_reads_as_it_was(samples: list[tuple[dict[str, str], float]]) -> None:
    metric = Metric(
        "holdfast_lag_messages", "gauge", "A line\nand \\ more.", [Sample(v, labels) for labels, v in samples]
    )
    assert read(render_text([metric])) == {metric.name: [(labels, float(value)) for labels, value in samples]}


def test_a_metric_without_values_is_left_out() -> None:
    metrics = [Metric("holdfast_a", "gauge", "A.", []), Metric("holdfast_b_total", "counter", "B.", [Sample(3)])]
    assert render_text(metrics) == "# HELP holdfast_b_total B.\n# TYPE holdfast_b_total counter\nholdfast_b_total 3\n"
    assert render_json(metrics) == [
        {"name": "holdfast_b_total", "kind": "counter", "help": "B.", "samples": [{"labels": {}, "value": 3}]}
    ]


def test_values_are_written_as_the_format_spells_them() -> None:
    values = [0, 2**53, 1.5, 1e300, math.inf, -math.inf, math.nan]
    text = render_text([Metric("holdfast_x", "gauge", "X.", [Sample(value) for value in values])])
    written = [line.split(" ")[1] for line in text.splitlines() if not line.startswith("#")]
    assert written == ["0", "9007199254740992.0", "1.5", "1e+300", "+Inf", "-Inf", "NaN"]
