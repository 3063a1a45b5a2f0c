"""A stack of independent injections: the results of one by one, whoever shares the stack; and the lean step."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from selfparam.errors import InjectionError
from selfparam.inject import inject
from selfparam.inject.pairs import build_rows, even_lines, line_tokens
from selfparam.inject.stack import inject_each, lora_layers, weights_of
from selfparam.inject.trainable import SHORT_LINE, lean, make_trainable
from selfparam.lm import LM
from selfparam.types import PAPER, Context, Recipe, Sentence, TargetSet
from tests.tiny import tiny_lm

RECIPE = PAPER.but(
    lr=1e-2, epochs=4, lora_dropout=0.0, precision="fp32", batch_tokens=64, schedule="linear", warmup=0.1
)
WORDS = ("Mara", "1911", "on the hill", "a blue book", "the evening boat")


def a_set(i: int, related: int, unrelated: int) -> TargetSet:
    x = Context(f"Lamp {i} stands on the hill. Its keeper is Mara and the light was built in 1911.")
    pairs = tuple(Sentence(f"What is fact {k} of lamp {i}?", f"{WORDS[k]} {i}", x.id) for k in range(related))
    return TargetSet(x, pairs, (Sentence("", "The boat came back.", None), Sentence("Who sails?", "Tom"))[:unrelated])


SETS = [a_set(0, 5, 2), a_set(1, 1, 0), a_set(2, 3, 1)]  # several steps an epoch, one row, and what lies between


def calm(kind: str) -> LM:
    """A tiny model without dropout of its own."""
    lm = tiny_lm(kind)
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return lm


def check(lm: LM, recipe: Recipe, stack: int = 3, losses: float = 1e-5, weights: float = 1e-4) -> None:
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    together = list(inject_each(lm, SETS, recipe, stack=stack))
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    for target_set, got in zip(SETS, together, strict=True):
        alone = inject(lm, [target_set], recipe)
        assert (got.rows, got.trained.steps, got.trained.tokens) == (
            alone.rows, alone.trained.steps, alone.trained.tokens)
        assert got.trained.losses == pytest.approx(alone.trained.losses, rel=losses, abs=losses)
        expected = alone.lm.model.state_dict()
        for name, value in got.lm.model.state_dict().items():
            assert torch.allclose(value, expected[name], atol=weights), name
        assert any(not torch.equal(v, before[k]) for k, v in expected.items())
        assert got.merge_error < 1e-4 and not got.lm.model.training


#: Plain, soft-caps and windows, transposed matrices, rows apart.
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "lfm2"])
@pytest.mark.parametrize("objective", ["kl", "next-word"])
def test_together_equals_one_by_one(kind: str, objective: str) -> None:
    check(calm(kind), RECIPE.but(objective=objective))


def test_with_compact_targets() -> None:
    check(calm("llama"), RECIPE.but(top_k=8))


def test_long_steps_in_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("selfparam.inject.stack"), "LINE_TOKENS", 40)
    check(calm("llama"), RECIPE.but(batch_tokens=100))


def test_two_stacks_clipping_decay_and_muon() -> None:
    check(calm("llama"), RECIPE.but(clip=0.05, weight_decay=0.1), stack=2)
    check(calm("llama"), RECIPE.but(optimizer="muon", epochs=2),
          losses=1e-3, weights=5e-3)  # its iteration runs in bfloat16 where that is fast


def test_in_bfloat16() -> None:
    check(calm("llama"), RECIPE.but(precision="bf16", lr=1e-3), losses=1e-2, weights=1e-2)
    lm = calm("llama")
    lm.model.to(torch.bfloat16)
    alone = inject(lm, [SETS[0]], RECIPE)
    [got] = inject_each(lm, SETS[:1], RECIPE)
    assert got.lm.model.dtype == torch.bfloat16
    assert got.trained.losses == pytest.approx(alone.trained.losses, rel=5e-2)


def test_what_cannot_be_stacked_is_refused() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(InjectionError, match="use 'lora', or inject one by one"):
        next(inject_each(lm, SETS, RECIPE.but(train="mlp")))
    with pytest.raises(InjectionError, match="with dropout"):
        next(inject_each(lm, SETS, PAPER))
    with pytest.raises(InjectionError, match="held_out = 0"):
        next(inject_each(lm, SETS, RECIPE.but(held_out=0.2)))
    with pytest.raises(InjectionError, match="at least 1"):
        next(inject_each(lm, SETS, RECIPE, stack=0))


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])  # this one drops out by itself, that one has experts
def test_what_cannot_share_a_stack_goes_one_by_one(kind: str) -> None:
    check(tiny_lm(kind), RECIPE)


def test_stacks_are_made_as_they_are_asked_for() -> None:
    found = inject_each(tiny_lm("llama"), [SETS[1], TargetSet(Context("nothing"), ())], RECIPE, stack=1)
    assert next(found).rows == 1
    with pytest.raises(InjectionError, match="no sentences"):
        next(found)


def test_a_loss_that_is_not_finite_is_one_line() -> None:
    with pytest.raises(InjectionError, match="smaller learning rate"):
        list(inject_each(tiny_lm("llama"), SETS, RECIPE.but(lr=1e30, clip=1e30)))


def test_a_stack_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(import_module("selfparam.inject.stack"), "_step", full)
    with pytest.raises(InjectionError, match="a stack of 3 contexts does not fit the memory"):
        next(inject_each(tiny_lm("llama"), SETS, RECIPE))


def test_lines_are_even() -> None:
    rows, _ = build_rows(tiny_lm("llama"), [SETS[0]], RECIPE)
    lines = even_lines(rows, range(len(rows)), 3)
    assert sorted(i for line in lines for i in line) == list(range(len(rows)))
    lengths = [line_tokens(rows, line) for line in lines]
    assert max(lengths) - min(lengths) <= max(len(row.student) for row in rows)


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2", "gemma2"])
def test_the_lean_step_gives_the_same_numbers_and_leaves_the_model(arch: str) -> None:
    lm = calm(arch)
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    model = make_trainable(lm, RECIPE)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(weights_of(layer)[1], std=0.02)
    packed = {"input_ids": torch.tensor([lm.encode("Who keeps the lamp? The lamp is green.")])}
    packed["position_ids"] = torch.tensor([[*range(3), *range(packed["input_ids"].shape[1] - 3)]])

    def states() -> list[torch.Tensor]:
        """The states of two rows in one line, and the gradient of an adapter."""
        model.zero_grad()
        h = lm.hidden(model, **packed)
        h[..., ::3].sum().backward()
        return [h.detach(), weights_of(lora_layers(model)[0][1])[0].grad.clone()]

    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        plain, attention = states(), lm.model.config._attn_implementation
        with lean(model, SHORT_LINE):
            assert lm.model.config._attn_implementation == "eager"
            ours = states()
        assert lm.model.config._attn_implementation == attention
        assert all(torch.equal(a, b) for a, b in zip(states(), plain, strict=True))
    for a, b in zip(ours, plain, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02
    after = {k.replace(".base_layer", ""): v for k, v in lm.model.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in after.items())
