"""selfparam score recommendations: the numbers, the notes about what was left out, and one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfparam.cli import main
from selfparam.data.conversations import write_outputs
from selfparam.data.films import film_world, write_film_world
from tests.test_recall import INSPIRED, needs_inspired

Run = Callable[..., tuple[int, str, str]]
FILES = ("--test", "test.jsonl", "--entities", "entity2id.json")


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A film world of ten people in the working folder, outputs.jsonl with the right film of every request."""
    world = film_world(people=10, films=12, seed=4)
    write_film_world(world, tmp_path)
    monkeypatch.chdir(tmp_path)
    found = [f"1. {row['entity_name'][0]}" for row in world.rows]
    write_outputs("outputs.jsonl", found)
    return found


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(("score", "recommendations", *arguments))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def scored(run: Run, *arguments: str) -> dict[str, Any]:
    code, out, err = run(*FILES, "--outputs", "outputs.jsonl", "--json", *arguments)
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_right_answers_and_a_table(run: Run, answers: list[str]) -> None:
    found = scored(run, "--items", "item_ids.json")
    assert (found["rows"], found["scored"], found["notes"]) == (40, 40, [])
    assert found["targets"] == {"all": 40, "recommendation": 30, "discussion": 10}
    assert found["recall"]["r1"] == {"all": [1.0] * 4, "recommendation": [1.0] * 4, "discussion": [1.0] * 4}
    assert found["recall"]["r4"]["discussion"] == [0.0] * 4
    assert found["shares"]["lists"] == 1.0 and found["shares"]["not_items"] == 0.0
    code, out, err = run(*FILES, "--outputs", "outputs.jsonl")
    assert (code, err) == (0, "")
    assert "r4 both" in out and "40 of 40 rows scored; one hit of 40 is 0.0250" in out
    assert "entities that are no item" not in out


def test_two_runs(run: Run, answers: list[str]) -> None:
    write_outputs("worse.jsonl", ["1. Nothing" if i < 6 else text for i, text in enumerate(answers)])
    found = scored(run, "--against", "worse.jsonl")["against"]
    assert found["rows"] == 40
    assert found["pairs"]["r1"][0] == {"only_first": 6, "only_second": 0, "p": 2 / 64}
    _, out, _ = run(*FILES, "--outputs", "worse.jsonl", "--against", "outputs.jsonl")
    assert "0 / 6 (0.031)" in out and "there: outputs.jsonl" in out


def test_scoring_goes_on_and_says_what_it_left_out(run: Run, answers: list[str]) -> None:
    lines = [{"index": i, "text": text} for i, text in enumerate(answers)]
    lines[3]["text"] = answers[3].removeprefix("1. ") + ", or nothing"
    given = [*lines[:30], lines[0], {"index": 40, "text": "1. x"}, {"text": "1. x"}]
    Path("outputs.jsonl").write_text("\n".join(map(json.dumps, given)))
    found = scored(run)
    assert (found["scored"], found["targets"]["all"], found["hits"]["r1"]["all"]) == (30, 30, [30] * 4)
    assert found["notes"] == [
        "outputs.jsonl: 10 of 40 rows have no output (30, 31, 32, 33, 34, …): left out of all means",
        "outputs.jsonl: 1 outputs are for rows that have one already (0): the first one counts",
        "outputs.jsonl: 1 outputs have an index that is no row of the test (40): left out",
        "outputs.jsonl: 1 lines have no 'index' or no 'text' (line 33): left out",
        "outputs.jsonl: 1 outputs hold no numbered list (no '1.'; index 3): their commas and line breaks divide them",
    ]
    code, _, err = run(*FILES, "--outputs", "outputs.jsonl")
    assert code == 0 and err.count("note: ") == 5


@pytest.mark.parametrize(("change", "complaint"), [
    (("--outputs", "none.jsonl"), "cannot read 'none.jsonl'"),
    (("--outputs", "entity2id.json"), "entity2id.json line 1: is not JSON"),
    (("--outputs", "test.jsonl"), "test.jsonl: holds no output for any of the 40 rows"),
    (("--test", "pairs.jsonl"), "pairs.jsonl line 1: 'input' is missing"),
    (("--entities", "item_ids.json"), "'item_ids.json' is no list of entities"),
    (("--items", "entity2id.json"), "'entity2id.json' is no list of ids"),
    (("--against", "test.jsonl"), "test.jsonl: holds no output"),
])
def test_one_line_and_exit_code_2(run: Run, answers: list[str], change: tuple[str, str], complaint: str) -> None:
    options = {"--test": "test.jsonl", "--entities": "entity2id.json", "--outputs": "outputs.jsonl"} | dict([change])
    code, out, err = run(*(word for option in options.items() for word in option))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and complaint in err and err.count("\n") == 1


def test_score_alone_names_what_is_missing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score"]) == 2
    assert capsys.readouterr().err.startswith("error: Missing command.")
    code, _, err = run("--outputs", "x")
    assert code == 2 and "Missing option '--test'" in err


@needs_inspired
def test_the_released_run_from_the_command_line(run: Run) -> None:
    expected = json.loads((INSPIRED / "mistral_base_expected.json").read_text("utf-8"))
    files = {"--test": "test.jsonl.gz", "--outputs": "mistral_base_outputs.jsonl.gz", "--items": "item_ids.json",
             "--entities": "entity2id.json.gz"}
    code, out, err = run(*(word for option, file in files.items() for word in (option, str(INSPIRED / file))), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["hits"] == expected["hits_with_lexicographic_ties"]
    assert {chosen: {"min": found["hits_low"][chosen]["all"], "max": found["hits_high"][chosen]["all"]}
            for chosen in found["hits"]} == expected["hit_bounds_over_all_tie_choices_all"]
