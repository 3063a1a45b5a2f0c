"""Checkpoints: an injection that was interrupted and continued ends in the same weights, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from selfparam.errors import ModelError, OutputError, StoppedError
from selfparam.inject import checkpoint as module
from selfparam.inject import inject
from selfparam.inject.checkpoint import Checkpoints
from selfparam.types import PAPER, Context, Recipe, Sentence, TargetSet
from tests.tiny import tiny_lm

X = Context("The red lamp stands on the hill. Its keeper is Mara.")
SETS = [TargetSet(
    X,
    (Sentence("Who keeps the lamp?", "Mara", X.id), Sentence("Where is it?", "on the hill", X.id)),
    (Sentence("", "The boat came back in the evening."), Sentence("Who rows?", "Tom")),
)]
RECIPE = PAPER.but(epochs=3, lr=1e-2, batch_tokens=40, schedule="cosine", warmup=0.1)
Weights = dict[str, torch.Tensor]


def trained(recipe: Recipe, checkpoints: Checkpoints | None = None) -> tuple[Weights, tuple[float, ...]]:
    done = inject(tiny_lm(), SETS, recipe, checkpoints=checkpoints)
    return done.lm.model.state_dict(), done.trained.losses


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class StopsAt(Checkpoints):
    """Stops after the given step, as a signal would."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder, every=1e9, advice="try again")
        self.at_step = step

    def after_step(self, at: module.Position, last: bool) -> None:
        self.stop = at.step == self.at_step
        super().after_step(at, last)


@pytest.mark.parametrize(
    "changes",
    [{}, {"train": "full", "optimizer": "muon"}, {"train": "mlp", "objective": "next-word"}, {"precision": "bf16"}],
    ids=str,
)
def test_continued_is_uninterrupted(tmp_path: Path, changes: dict[str, object]) -> None:
    """LoRA has dropout here, so torch's random state counts; steps lie inside epochs and on their borders."""
    recipe = RECIPE.but(**changes)
    expected, losses = trained(recipe)
    steps = inject(tiny_lm(), SETS, recipe).trained.steps
    assert steps >= 6
    for stop in (1, steps // 3, steps // 2, steps - 1, steps):
        folder = tmp_path / str(stop)
        with pytest.raises(StoppedError, match=f"after step {stop}, everything is saved: continue with  try again"):
            trained(recipe, StopsAt(folder, stop))
        weights, again = trained(recipe, Checkpoints(folder))
        assert again == losses
        assert same(weights, expected)


def test_stopped_at_every_step_in_turn(tmp_path: Path) -> None:
    expected, losses = trained(RECIPE)
    for stop in range(1, 100):
        try:
            weights, again = trained(RECIPE, StopsAt(tmp_path, stop))
        except StoppedError:
            assert len(list(tmp_path.glob("step-*.json"))) <= 2
            continue
        assert stop > 6 and again == losses and same(weights, expected)
        return


def test_the_teacher_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoppedError):
        trained(RECIPE, StopsAt(tmp_path, 2))
    monkeypatch.setattr(sys.modules["selfparam.inject"], "teacher_targets", None)  # calling it would fail
    trained(RECIPE, Checkpoints(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "json", "digit", "gone"])
def test_a_damaged_newest_falls_back(tmp_path: Path, damage: str) -> None:
    expected, losses = trained(RECIPE)
    for stop in (2, 4):
        with pytest.raises(StoppedError):
            trained(RECIPE, StopsAt(tmp_path, stop))
    says = tmp_path / "step-00000004.json"
    weights = says.with_suffix(".safetensors")
    data = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(data[:-100])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "bit":
        data[-7] ^= 1
        weights.write_bytes(data)
    elif damage == "gone":
        weights.unlink()
    else:
        text = says.read_text()
        says.write_text(text[:50] if damage == "json" else text.replace('"step": 4', '"step": 3'))
    notes: list[str] = []
    again = trained(RECIPE, Checkpoints(tmp_path, note=notes.append))
    assert len(notes) == 1 and "step-00000004 is damaged" in notes[0]
    assert again[1] == losses and same(again[0], expected)


def test_all_damaged_begins_again(tmp_path: Path) -> None:
    expected, _ = trained(RECIPE)
    with pytest.raises(StoppedError):
        trained(RECIPE, StopsAt(tmp_path, 3))
    for path in tmp_path.iterdir():
        path.write_bytes(b"nonsense")
    assert same(trained(RECIPE, Checkpoints(tmp_path))[0], expected)


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"seed": 1}])
def test_checkpoints_of_another_injection_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(StoppedError):
        trained(RECIPE, StopsAt(tmp_path, 1))
    with pytest.raises(ModelError, match="belongs to other weights, sentences or settings"):
        trained(RECIPE.but(**change), Checkpoints(tmp_path))


def test_checkpoints_with_another_teacher_curvature_or_known_sentences_are_refused(tmp_path: Path) -> None:
    held = RECIPE.but(retention=1.0)
    curvature = inject(tiny_lm(), SETS, held).curvature
    changes: list[dict[str, Any]] = [{"teacher": tiny_lm(seed=1)}, {"curvature": curvature},
                                     {"known": (Sentence("Who rows?", "Ann"),)}]
    for change in changes:
        with pytest.raises(StoppedError):
            inject(tiny_lm(), SETS, held, known=change.get("known", ()), checkpoints=StopsAt(tmp_path, 1))
        other = {"known": (), **change} if "known" not in change else {"known": ()}
        with pytest.raises(ModelError, match="belongs to other weights, sentences or settings"):
            inject(tiny_lm(), SETS, held, checkpoints=Checkpoints(tmp_path), **other)
        shutil.rmtree(tmp_path)


def test_saved_at_the_interval(tmp_path: Path) -> None:
    expected, _ = trained(RECIPE)
    weights, _ = trained(RECIPE, Checkpoints(tmp_path, every=0.0))
    assert same(weights, expected)
    assert len(list(tmp_path.glob("step-*.json"))) == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()).count(".tmp") == 0
    shutil.rmtree(tmp_path)
    trained(RECIPE, Checkpoints(tmp_path, every=1e9))
    assert len(list(tmp_path.glob("step-*.json"))) == 1  # the last step, so that what follows can be done again


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    expected, _ = trained(RECIPE)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "save_file", full)
    notes: list[str] = []
    weights, _ = trained(RECIPE, Checkpoints(tmp_path, every=0.0, note=notes.append))
    assert same(weights, expected)
    assert "training goes on" in notes[0]
    assert os.listdir(tmp_path) == []
    with pytest.raises(OutputError, match="could not be written"):
        trained(RECIPE, StopsAt(tmp_path, 1))


def test_the_random_state_is_that_of_the_gpu_that_is_trained_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.nn.Parameter):
        """Says that it lies on a GPU that is not the current one."""

        is_cuda, device = True, torch.device("cuda:1")

    states = {torch.device("cuda:1"): torch.zeros(4, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    one = Checkpoints(tmp_path)
    assert one.begin([OnGpu(torch.ones(2))], [], random.Random(0)).step == 0
    at = module.Position(step=1)
    at.begin_epoch(0, random.Random(0))
    one.after_step(at, last=True)
    states[torch.device("cuda:1")] = torch.ones(4, dtype=torch.uint8)
    assert Checkpoints(tmp_path).begin([OnGpu(torch.ones(2))], [], random.Random(0)).step == 1
    assert not states[torch.device("cuda:1")].any()
