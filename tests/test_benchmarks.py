"""Data of the tables: PwC and any JSONL become items, filters say what they left out, worlds stay the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from selfparam.data import pwc, qa
from selfparam.data.benchmarks import BENCHMARKS
from selfparam.errors import ContextError, DataError

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "qa"
ROWS = [
    {"input": "Ann keeps bees.", "prompt": "Who keeps bees?", "answer": "Ann"},
    {"input": "Bo mends nets.", "prompt": "Describe Bo.", "answer": "Bo is somebody who mends nets."},
    {"input": "Ann keeps bees.", "prompt": "What does Ann keep?", "answer": "Bees."},
    {"input": "Bo mends nets.", "prompt": "What does Bo mend?", "answer": "nets"},
]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["pwc.jsonl", "pwc.jsonl.gz"])
def test_pwc_keeps_short_answers_and_the_order_of_contexts(tmp_path: Path, name: str) -> None:
    found = BENCHMARKS["pwc"](2, 0, len, path=write(tmp_path / name, ROWS))
    assert [item.context.text for item in found.items] == ["Ann keeps bees.", "Bo mends nets."]
    assert [[q.text for q in item.questions] for item in found.items] == [
        ["Who keeps bees?", "What does Ann keep?"], ["What does Bo mend?"]]
    assert all(q.about == item.context.id for item in found.items for q in item.questions)
    assert found.notes == ("pwc: 2 contexts with 3 questions",
                           "pwc: 1 questions with answers of more than 5 tokens left out")


def test_pwc_sample() -> None:
    """The ten rows have free answers: the filter must leave the short ones, and every row must be read."""
    file = SHARED / "pwc_sample.jsonl.gz"
    if not file.exists():
        pytest.skip(f"no {file.name} beside the repository")
    rows = pwc.rows(str(file))
    assert len(rows) == 10
    [item] = qa.items_of(rows, "pwc", answer_tokens=1)[0]
    assert item.questions[0].answers == ("Arabic.",)
    short = BENCHMARKS["pwc"](2, 0, len, path=str(file))
    assert [i.questions[0].answers for i in short.items] == [("Benoit Quennedey",), ("Arabic.",)]


@pytest.mark.parametrize("name", ["squad2_dev_half_answerable", "babi_en_train", "policyqa_dev"])
def test_shared_sets(name: str) -> None:
    file = SHARED / f"{name}.jsonl.gz"
    if not file.exists():
        pytest.skip(f"no {file.name} beside the repository")
    found = BENCHMARKS["jsonl"](20, 3, lambda text: len(text.split()), path=str(file), answer_tokens=5, longest=200)
    assert (len(found.items), len(found.fresh)) == (20, 3)
    assert not {i.context.id for i in found.items} & {i.context.id for i in found.fresh}


def test_long_contexts_are_left_out_and_named(tmp_path: Path) -> None:
    rows = [{"context": "x " * n, "question": "?", "answers": ["y", "z"]} for n in (3, 9)]
    found = BENCHMARKS["jsonl"](1, 0, lambda text: len(text.split()), path=write(tmp_path / "a.jsonl", rows), longest=5)
    assert found.items[0].questions[0].answers == ("y", "z")
    assert found.notes[-1] == "a.jsonl: 1 contexts of more than 5 tokens left out"
    with pytest.raises(ContextError, match="only 1 of 2 contexts"):
        BENCHMARKS["jsonl"](2, 0, lambda text: len(text.split()), path=str(tmp_path / "a.jsonl"), longest=5)


def test_some_lines_in_a_drawn_order(tmp_path: Path) -> None:
    rows = [{"title": "ab"[n % 2], "context": f"x{n}", "question": "?", "answers": ["y"]} for n in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    found = [BENCHMARKS["jsonl"](10, 0, len, path=path, only={"title": ["b"]}, seed=seed) for seed in (None, 1, 1)]
    plain, drawn, again = [[item.context.text for item in one.items] for one in found]
    assert plain == [f"x{n}" for n in range(1, 20, 2)]
    assert drawn == again != plain and sorted(drawn) == sorted(plain)
    with pytest.raises(ContextError, match="must name fields"):
        BENCHMARKS["jsonl"](1, 0, len, path=path, only={"title": "b"})


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "line 1: is not JSON"), ("[]", "line 1: is not a JSON object"),
     ('{"context": "a", "question": "b"}', "must be texts"),
     ('{"context": "a", "question": "b", "answers": []}', "must be texts")],
)
def test_wrong_lines_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises((ContextError, DataError), match=says):
        qa.rows_of_file(tmp_path / "a.jsonl")


def test_missing_file() -> None:
    with pytest.raises(DataError, match=r"cannot read 'no-such\.jsonl'"):
        qa.rows_of_file("no-such.jsonl")


def test_data_as_editors_and_downloads_leave_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    line = b'{"context": "a", "question": "b", "answers": ["c"]}\n'
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + line))
    assert qa.rows_of_file(path) == [("a", "b", ("c",))]
    damaged = bytearray(gzip.compress(line * 300))
    damaged[20] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged gzip"):
        qa.rows_of_file(path)


def test_worlds_grow_at_the_end() -> None:
    few, many = (BENCHMARKS["worlds"](n, 2, len) for n in (3, 5))
    assert many.items[:3] == few.items and many.fresh == few.fresh
    assert few.hash != many.hash and few.hash == BENCHMARKS["worlds"](3, 2, len).hash
    assert not {i.context.id for i in many.items} & {i.context.id for i in many.fresh}
    item = few.items[0]
    assert len(item.elsewhere) == len(item.questions)
    assert all(e.answers == q.answers and e.text != q.text for e, q in zip(item.elsewhere, item.questions, strict=True))
