"""QA-F1 against the golden tables computed with LongBench's own function: equal to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfparam.metrics.qa_f1 import mean_f1, qa_f1

GOLDEN = Path(__file__).parent / "golden"
CASES = [json.loads(line) for line in (GOLDEN / "qa_f1_golden.jsonl").read_text("utf-8").splitlines()]
AGGREGATE = json.loads((GOLDEN / "qa_f1_aggregate_golden.json").read_text("utf-8"))


def test_table_is_whole() -> None:
    assert len(CASES) == 62


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["case"])
def test_golden(case: dict[str, Any]) -> None:
    assert [qa_f1(case["prediction"], [a]) for a in case["answers"]] == case["per_answer"]
    assert qa_f1(case["prediction"], case["answers"]) == case["score"]


def test_mean_over_contexts() -> None:
    scores: dict[str, list[float]] = {}
    for item in AGGREGATE["items"]:
        scores.setdefault(item["context_id"], []).append(qa_f1(item["prediction"], item["answers"]))
    assert {c: mean_f1({c: s}) for c, s in scores.items()} == AGGREGATE["per_context_mean"]
    assert mean_f1(scores) == AGGREGATE["mean_over_contexts"]
    assert mean_f1(scores) != AGGREGATE["mean_over_questions"]


def test_no_references_score_nothing() -> None:
    assert qa_f1("Paris", []) == 0.0


def test_one_string_is_refused() -> None:
    with pytest.raises(TypeError, match="list"):
        qa_f1("Paris", "Paris")


@pytest.mark.parametrize("scores", [{}, {"x": []}])
def test_nothing_to_average_is_refused(scores: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="at least one score"):
        mean_f1(scores)
