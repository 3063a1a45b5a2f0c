"""Conversations: both file formats, roles, limits, what is wrong with a file in one line, and the real sets."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from selfparam.data.conversations import (
    SOURCES,
    Request,
    SetName,
    Turn,
    conversation,
    conversations,
    input_of,
    read_conversations,
    read_entities,
    read_items,
    read_outputs,
    read_requests,
    turns_of,
    write_outputs,
)
from selfparam.data.files import json_lines
from selfparam.errors import DataError
from selfparam.types import Context

CONVREC = Path(__file__).resolve().parents[2] / "shared" / "data" / "convrec"
needs_convrec = pytest.mark.skipif(not CONVREC.is_dir(), reason=f"needs the conversations in {CONVREC}")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def row(dialog: str, context: list[str], resp: str) -> dict[str, Any]:
    return {"dialog_id": dialog, "context": context, "resp": resp, "is_user": 0}


def test_a_conversation_is_a_context_and_back() -> None:
    turns = [Turn("System", "Hello."), Turn("User", "Hi.\n I like: Heat"), Turn("User", "And Up."), Turn("User", " "),
             Turn("System", "Fine.")]
    x = conversation(turns, "a talk")
    assert x.text == "System: Hello.\nUser: Hi. I like: Heat And Up.\nSystem: Fine."
    assert turns_of(x) == [Turn("System", "Hello."), Turn("User", "Hi. I like: Heat And Up."), Turn("System", "Fine.")]
    assert input_of(turns_of(x)[:2]) == "\nSystem: Hello.\nUser: Hi. I like: Heat And Up.\nSystem: "
    with pytest.raises(DataError, match="'Notes' is no conversation"):
        turns_of(Context("User: a\nSpeaker: b", "Notes"))


def test_dialogues(tmp_path: Path) -> None:
    turns = [{"role": "recommender", "text": "Hi QUOTATION_MARKyouQUOTATION_MARK"}, {"role": "seeker", "text": "Yes"}]
    path = write(tmp_path / "d.jsonl", [{"dialog_id": "one", "turns": turns}])
    [x] = read_conversations(path)
    assert (x.title, x.source, x.text) == ("one", "d.jsonl", 'System: Hi "you"\nUser: Yes')


def test_rows_become_the_longest_conversation_of_their_dialogue(tmp_path: Path) -> None:
    rows = [row("a", ["", "Hi"], "Up"), row("a", ["", "Hi", "Up", "Seen it"], "Heat"), row("b", ["", "Hello"], "Ran"),
            row("a", ["", "Hi"], "Up")]
    path = write(tmp_path / "rows.jsonl", rows)
    both = read_conversations(path, first="System")
    assert [x.text for x in both] == ["User: Hi\nSystem: Up\nUser: Seen it\nSystem: Heat", "User: Hello\nSystem: Ran"]
    assert read_conversations(path, first="System", limit=1) == both[:1]
    assert read_conversations(path, first="User", limit=1)[0].text.startswith("System: Hi")  # INSPIRED's order


def test_rows_without_an_id_are_conversations_of_their_own(tmp_path: Path) -> None:
    rows: list[Any] = [{"dialog_id": None, "context": [None, f"Hi {i}"], "resp": None} for i in range(2)]
    found = read_conversations(write(tmp_path / "rows.jsonl", rows), first="System")
    assert [x.text for x in found] == ["User: Hi 0", "User: Hi 1"]


def test_by_default_as_many_as_in_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train.jsonl", [row(str(i), ["", f"Hi {i}"], "Up") for i in range(1100)])
    asked: list[tuple[Any, ...]] = []

    def download(repo: str, file: str, repo_type: str) -> str:
        asked.append((repo, file, repo_type))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(conversations("inspired")) == 731 and len(conversations("redial")) == 1000
    assert [len(conversations("redial", path, limit)) for limit in (3, 1050, 5000)] == [3, 1050, 1100]
    assert asked == [("ZhankuiHe/inspired_cikm", "train.jsonl", "dataset"),
                     ("ZhankuiHe/redial_cikm", "train.jsonl", "dataset")]


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"train\.jsonl of ZhankuiHe/redial_cikm.*\(no route\): give a local file"):
        conversations("redial")


@pytest.mark.parametrize(("content", "complaint"), [
    ("", "is empty"),
    ("{", "line 1: is not JSON"),
    ("[]", "line 1: is not a JSON object"),
    ('{"turns": 3}', "line 1: 'turns' is no list"),
    ('{"turns": [{"role": "cook", "text": "Hi"}]}', "line 1: a turn needs 'text' and a 'role'"),
    ('\n{"resp": "Hi"}', "line 2: 'context' is no list"),
    ('{"turns": [{"role": "seeker", "text": " "}]}', "holds no conversation"),
])
def test_what_is_wrong_with_conversations(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint) as error:
        read_conversations(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"{}" * 500)[:20])
    for name, complaint in (("none.jsonl", "cannot read"), ("latin.jsonl", "not UTF-8"), ("cut.gz", "damaged gzip")):
        with pytest.raises(DataError, match=complaint):
            read_conversations(tmp_path / name)
    with pytest.raises(DataError, match="at least 1"):
        read_conversations(tmp_path / "none.jsonl", limit=0)


def test_requests_and_entities(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text('{"Heat": 0, "Up": 7}')
    entities = read_entities(tmp_path / "e.json")
    assert entities == {0: "Heat", 7: "Up"}
    good = {"input": "\nUser: Hi\nSystem: ", "rec": [7], "prev_entity": [0]}
    path = write(tmp_path / "test.jsonl", [good, good])
    assert read_requests(path, entities) == [Request("\nUser: Hi\nSystem: ", (7,), (0,))] * 2
    assert len(read_requests(path, entities, limit=1)) == 1
    for change, complaint in (({"input": None}, "'input' is missing"), ({"rec": [8]}, "no entity has the id 8"),
                              ({"rec": [[1]]}, r"no entity has the id \[1\]"),
                              ({"rec": []}, "'rec' is empty"), ({"prev_entity": None}, "'prev_entity' is no list")):
        with pytest.raises(DataError, match=f"line 1: {complaint}"):
            read_requests(write(tmp_path / "bad.jsonl", [good | change]), entities)
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(DataError, match="no list of entities"):
        read_entities(tmp_path / "bad.json")
    with pytest.raises(DataError, match="no list of ids"):
        read_items(tmp_path / "e.json")


def test_outputs_say_what_was_left_out(tmp_path: Path) -> None:
    write_outputs(tmp_path / "whole.jsonl", ["1. Heat", "1. Up"])
    assert read_outputs(tmp_path / "whole.jsonl", 2) == ({0: "1. Heat", 1: "1. Up"}, [])
    given: list[Any] = [{"index": 0, "text": "first"}, {"index": 0, "text": "second"}, {"index": 9, "text": "x"},
                        {"index": -1, "text": "x"}, {"text": "x"}, {"index": 2, "text": None},
                        {"index": True, "text": ""}]
    found, notices = read_outputs(write(tmp_path / "o.jsonl", given), 8)
    assert found == {0: "first"}
    assert notices == [
        "o.jsonl: 7 of 8 rows have no output (1, 2, 3, 4, 5, …): left out of all means",
        "o.jsonl: 1 outputs are for rows that have one already (0): the first one counts",
        "o.jsonl: 2 outputs have an index that is no row of the test (9, -1): left out",
        "o.jsonl: 3 lines have no 'index' or no 'text' (line 5, 2, line 7): left out",
    ]
    with pytest.raises(DataError, match="no output for any of the 3 rows"):
        read_outputs(write(tmp_path / "none.jsonl", [{"index": 5, "text": "x"}]), 3)


# --- the real sets ---------------------------------------------------------------------------------------------------


@needs_convrec
@pytest.mark.parametrize(("name", "file", "count"), [
    ("inspired", "inspired_dev.jsonl.gz", 99), ("redial", "redial_iard.jsonl.gz", 298),
])
def test_real_dialogues(name: SetName, file: str, count: int) -> None:
    found = conversations(name, CONVREC / "dialogues" / file)
    assert len(found) == count
    for x in found:
        roles = [turn.role for turn in turns_of(x)]
        assert all(a != b for a, b in pairwise(roles))
        assert "QUOTATION_MARK" not in x.text


@needs_convrec
@pytest.mark.parametrize(("name", "count", "targets"), [("inspired", 228, 253), ("redial", 3552, 4778)])
def test_real_rows_have_our_roles(name: SetName, count: int, targets: int) -> None:
    folder = CONVREC / name
    entities = read_entities(folder / "entity2id.json.gz")
    requests = read_requests(folder / "test.jsonl.gz", entities)
    assert (len(requests), sum(len(r.targets) for r in requests)) == (count, targets)
    assert read_items(folder / "item_ids.json") >= {i for r in requests for i in r.targets}
    first = SOURCES[name].first
    second = "System" if first == "User" else "User"
    raw = [row for row, _ in json_lines(folder / "test.jsonl.gz")]
    for one, request in zip(raw, requests, strict=True):
        turns = [Turn(first if i % 2 == 0 else second, text) for i, text in enumerate(one["context"]) if text]
        assert input_of(turns) == request.input
