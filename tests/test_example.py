"""examples/inject_loop.py, the naive method in one file, against selfparam.inject: same losses, same weights."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfparam.inject import inject
from selfparam.inject.pairs import build_rows
from selfparam.lm import LM
from selfparam.types import PAPER, Context, Sentence, TargetSet
from tests.tiny import tiny_lm

FILE = Path(__file__).parents[1] / "examples" / "inject_loop.py"
EXAMPLE = runpy.run_path(str(FILE))
X = "The red lamp stands on the hill. Its keeper is Mara and the light was built in 1911."
PAIRS = [("Who keeps the lamp?", "Mara"), ("When was it built?", "1911"), ("Where does it stand?", "on the hill")]
UNRELATED = ["The boat came back in the evening.", "Nobody had seen the second letter."]
LR = {"lora": 2e-3, "full": 2e-4}
#: One step an epoch, nothing random but the LoRA initialisation.
RECIPE = PAPER.but(epochs=5, lora_dropout=0.0, precision="fp32", batch_tokens=10_000)


def target_set() -> TargetSet:
    x = Context(X)
    related = tuple(Sentence(q, a, x.id) for q, a in PAIRS)
    return TargetSet(x, related, tuple(Sentence("", text) for text in UNRELATED))


def by_example(lm: LM, train: str, **changes: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    options = {"epochs": 5, "lr": LR[train], "train": train, "dropout": 0.0, **changes}
    model, losses = EXAMPLE["inject"](lm.model, lm.tokenizer, X, PAIRS, UNRELATED, **options)
    return model.state_dict(), losses


def furthest(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[k] - two[k]).abs().max()) for k in one)


@pytest.mark.parametrize("chat", [False, True])
def test_rows_are_the_same_ids(chat: bool) -> None:
    lm = tiny_lm("llama", chat=chat)
    rows, prefixes = build_rows(lm, [target_set()], PAPER)
    expected = [(prefixes[r.prefix], list(r.student[: r.first]), list(r.s)) for r in rows]
    assert EXAMPLE["prefix_and_sentences"](lm.tokenizer, X, PAIRS, UNRELATED) == expected


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_losses_and_weights_equal_inject(train: str, chat: bool) -> None:
    lm = tiny_lm("llama", chat=chat)
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    done = inject(lm, [target_set()], RECIPE.but(train=train, lr=LR[train]))
    expected = done.lm.model.state_dict()
    weights, losses = by_example(lm, train)
    assert losses == pytest.approx(done.trained.losses, rel=1e-4)
    assert losses[-1] < 0.98 * losses[0]
    assert furthest(weights, expected) < 1e-4
    assert furthest(weights, before) > 5e-4
    assert furthest(lm.model.state_dict(), before) == 0.0


def test_any_other_setting_gives_other_weights() -> None:
    """The comparison above is able to fail."""
    lm = tiny_lm("llama")
    expected = inject(lm, [target_set()], RECIPE.but(lr=LR["lora"])).lm.model.state_dict()
    for change in ({"lr": 1e-3}, {"seed": 1}, {"epochs": 4}, {"batch": 2}, {"dropout": 0.1}):
        weights, _ = by_example(lm, "lora", **change)
        assert furthest(weights, expected) > 5e-4, change


def test_nothing_to_train_and_too_long() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(ValueError, match="give pairs"):
        EXAMPLE["inject"](lm.model, lm.tokenizer, X, [], [])
    with pytest.raises(ValueError, match="split the context"):
        EXAMPLE["inject"](lm.model, lm.tokenizer, "word " * 5000, PAIRS, [])


def test_main_writes_a_model_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    lm.save(tmp_path / "model")
    (tmp_path / "x.txt").write_text(X, "utf-8")
    records = [json.dumps({"question": q, "answer": a}) for q, a in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(records) + "\n", "utf-8")
    (tmp_path / "other.txt").write_text("\n\n".join(UNRELATED) + "\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # dropout draws other numbers there
    files = "--model model --context x.txt --pairs pairs.jsonl --unrelated other.txt --out out"
    EXAMPLE["main"]([*files.split(), "--epochs", "2", "--lr", "1e-2"])
    assert "epoch 2/2" in capsys.readouterr().out
    expected, _ = by_example(lm, "lora", epochs=2, lr=1e-2, dropout=0.1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert furthest(loaded.state_dict(), expected) < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(X) == lm.tokenizer.encode(X)


def test_the_example_needs_no_selfparam() -> None:
    names: set[str] = set()
    for node in ast.walk(ast.parse(FILE.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    assert {n.split(".")[0] for n in names} - sys.stdlib_module_names == {"torch", "transformers", "peft"}
