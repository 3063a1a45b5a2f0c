"""Cells in progress: interrupted inside of a cell, a table goes on there and ends with the same scores."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfparam.experiments import unfinished
from selfparam.experiments.run import run_table
from selfparam.experiments.spec import Table
from selfparam.inject.checkpoint import Checkpoints
from selfparam.methods import selfparam
from tests.test_tables import lines, make, model  # noqa: F401 (a fixture)

OURS = """
[[methods]]
label = "Ours"
method = "selfparam"
source = "self"
ratio = 0
recipe = {{ from = "small-sequential", epochs = 2, batch_tokens = 64, most_batch_tokens = 0, train = "{train}" }}
author = "oracle"
"""
SCORES = ("f1", "answers", "contexts", "world", "kl", "matrix", "learned", "answers_by_step", "steps", "pairs")


@pytest.fixture(autouse=True)
def at_every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stopped_after(calls: int, inner: Callable[..., Any]) -> Callable[..., Any]:
    """The function, interrupted as by Ctrl-C in the call after so many."""
    left = [calls]

    def wrapped(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return inner(*args, **options)

    return wrapped


def scores(table: Table) -> dict[str, Any]:
    [row] = lines(table)
    return {key: row[key] for key in SCORES if key in row}


def sequence(folder: Path, name: str, train: str = "mlp") -> Table:
    folder.mkdir(exist_ok=True)
    return make(folder, name, OURS.format(train=train), "sequential", 4, "ask_at = [0, 2, 4]\n")


def test_a_sequence_goes_on_behind_its_last_step(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    whole, cut = sequence(tmp_path / "whole", model), sequence(tmp_path / "cut", model)
    run_table(whole)
    with monkeypatch.context() as patched:
        patched.setattr(selfparam, "inject", stopped_after(3, selfparam.inject))
        with pytest.raises(KeyboardInterrupt):
            run_table(cut)
    [kept] = cut.results.with_suffix(".unfinished").glob("*/kept-*")
    assert kept.name == "kept-00000003" and not cut.results.exists()
    said: list[str] = []
    monkeypatch.setattr(selfparam, "inject", stopped_after(1, selfparam.inject))  # one step is left
    run_table(cut, says=said.append)
    assert "Ours 1: context 4 of 4" in said
    found, wanted = scores(cut), scores(whole)
    assert found.pop("kl") == pytest.approx(wanted.pop("kl"), rel=1e-3)
    assert found == wanted
    assert not cut.results.with_suffix(".unfinished").exists()


def test_a_damaged_step_is_told_and_begins_again(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    table = sequence(tmp_path / "cut", model, "lora")
    with monkeypatch.context() as patched:
        patched.setattr(selfparam, "inject", stopped_after(2, selfparam.inject))
        with pytest.raises(KeyboardInterrupt):
            run_table(table)
    [kept] = table.results.with_suffix(".unfinished").glob("*/kept-*")
    (kept / "weights.safetensors").write_bytes(b"torn")
    said: list[str] = []
    run_table(table, says=said.append)
    assert any("is damaged" in line for line in said) and "Ours 1: context 1 of 4" in said
    assert len(scores(table)["learned"]) == 4


def test_a_disk_that_is_full_does_not_end_a_cell(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unfinished, "save_model", full)
    said: list[str] = []
    table = sequence(tmp_path / "cut", model)
    run_table(table, says=said.append)
    assert any("No space left on device" in line for line in said) and lines(table)
    assert any(re.fullmatch(r"Ours 1: context 4 of 4, about 0:00:\d\d left of it", line) for line in said)


def test_one_call_goes_on_from_its_checkpoint(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def table(name: str) -> Table:
        (tmp_path / name).mkdir()
        return make(tmp_path / name, model, OURS.format(train="mlp"), "batch", 3)

    whole, cut = table("whole"), table("cut")
    run_table(whole)
    steps: list[int] = []
    after = Checkpoints.after_step

    def counted(self: Checkpoints, at: Any, last: bool) -> None:
        steps.append(at.step)
        after(self, at, last)
        if at.step == 3 and steps == [1, 2, 3]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "after_step", counted)
    with pytest.raises(KeyboardInterrupt):
        run_table(cut)
    said: list[str] = []
    run_table(cut, says=said.append)
    assert any(re.match(r"Ours 1: epoch 2 of 2, loss [\d.]+, about 0:00:00 left of it", line) for line in said)
    assert steps[3] in (2, 3, 4) and steps[3:] == list(range(steps[3], steps[-1] + 1))
    assert scores(cut) == scores(whole)
    assert not cut.results.with_suffix(".unfinished").exists()


def test_what_reads_is_not_kept(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(unfinished, "save_model", lambda *_: pytest.fail("nothing is to be kept"))
    folder = tmp_path / "t"
    folder.mkdir()
    table = make(folder, model, '\n[[methods]]\nlabel = "BM25"\nmethod = "bm25"\n', "sequential", 2)
    run_table(table)
    assert lines(table) and not table.results.with_suffix(".unfinished").exists()
