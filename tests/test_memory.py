"""Compact targets against float64, targets in files, micro-batches under faked shortage, sentences held out."""

from __future__ import annotations

import math
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from selfparam.errors import InjectionError, OutputError
from selfparam.inject import inject, loop, pairs, teacher
from selfparam.inject.checkpoint import Checkpoints
from selfparam.inject.memory import Kept, Micro
from selfparam.inject.objective import Compact, Exact, Head, loss_of, loss_of_tokens
from selfparam.inject.pairs import build_rows, offsets, pack
from selfparam.inject.teacher import teacher_states, teacher_targets
from selfparam.types import PAPER, Context, Recipe, Sentence, TargetSet
from tests.tiny import tiny_lm

X = Context("The red lamp stands on the hill. Its keeper is Mara.")
SETS = [TargetSet(
    X,
    tuple(Sentence(f"What is number {i}?", f"thing {i}", X.id) for i in range(6)),
    (Sentence("", "The boat came back in the evening."), Sentence("Who rows?", "Tom")),
)]
RECIPE = PAPER.but(epochs=2, lr=1e-2, batch_tokens=80, lora_dropout=0.0, precision="fp32", unrelated_weight=0.5)
Weights = dict[str, torch.Tensor]


def trained(recipe: Recipe = RECIPE, **options: object) -> tuple[Weights, tuple[float, ...]]:
    done = inject(tiny_lm(), SETS, recipe, **options)  # type: ignore[arg-type]
    return done.lm.model.state_dict(), done.trained.losses


def close(a: Weights, b: Weights) -> bool:
    return all(torch.allclose(a[name], b[name], atol=5e-5) for name in a)


# --- compact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("k", [1, 7, 49, 99])
def test_compact_and_its_gradients_equal_float64_autograd(softcap: float | None, k: int) -> None:
    g = torch.Generator().manual_seed(0)
    n, d, v = 37, 8, 50
    h, t, w = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g), torch.rand(n, generator=g)
    weight = (2 * torch.randn(v, d, generator=g)).requires_grad_()
    student, head = h.clone().requires_grad_(), Head(weight, None, softcap)
    with torch.no_grad():
        target = Compact.of(head.logits(t), k)
    loss = loss_of(student, head, target, w)
    loss.backward()

    def probabilities(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        raw = x @ a.T
        return (torch.tanh(raw / softcap) * softcap if softcap else raw).softmax(-1)

    h64, w64 = h.double().requires_grad_(), weight.detach().double().requires_grad_()
    p, q = probabilities(t.double(), w64.detach()), probabilities(h64, w64)
    top = p.topk(min(k, v - 1)).indices
    inside = torch.zeros_like(p).scatter(1, top, 1.0)
    p_rest, q_rest = (p * (1 - inside)).sum(-1), (q * (1 - inside)).sum(-1)
    each = (inside * p * (p / q).log()).sum(-1) + p_rest * (p_rest / q_rest).log()
    (each * w.double()).sum().backward()
    assert float(loss) == pytest.approx(float((each * w.double()).sum()), rel=1e-5)
    assert torch.allclose(student.grad.double(), h64.grad, atol=2e-5)
    assert torch.allclose(weight.grad.double(), w64.grad, atol=2e-4)


def test_compact_is_below_exact_and_comes_up_to_it() -> None:
    g = torch.Generator().manual_seed(1)
    h, t, head = torch.randn(40, 8, generator=g), torch.randn(40, 8, generator=g), Head(torch.randn(30, 8, generator=g))
    exact = loss_of_tokens(h, head, Exact(t, head))
    found = [loss_of_tokens(h, head, Compact.of(head.logits(t), k)) for k in (1, 4, 16, 29)]
    for fewer, more in zip(found, [*found[1:], exact], strict=True):
        assert bool((fewer <= more + 1e-5).all())
    assert torch.allclose(found[-1], exact, atol=1e-5)
    assert float(found[0].mean()) < 0.9 * float(exact.mean())
    assert loss_of_tokens(h[:0].to("meta"), head, Exact(t, head)).device.type == "meta"  # of no rows, where they are
    same = loss_of_tokens(t, head, Compact.of(head.logits(t), 4))
    assert float(same.abs().max()) == 0.0


def test_compact_trains_like_exact() -> None:
    exact, nearly, rough = (trained(RECIPE.but(top_k=k)) for k in (0, 10_000, 3))
    assert close(exact[0], nearly[0]) and nearly[1] == pytest.approx(exact[1], abs=1e-5)
    assert not close(exact[0], rough[0]) and rough[1][-1] < rough[1][0] < exact[1][0]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary files go here, and all of them must be gone in the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"precision": "bf16"}], ids=str)
def test_spilled_equals_kept(folder: Path, changes: dict[str, object]) -> None:
    expected, spilled = (trained(RECIPE.but(**changes), cache_bytes=size) for size in (1 << 30, 0))
    assert all(torch.equal(expected[0][name], spilled[0][name]) for name in expected[0])
    assert expected[1] == spilled[1]


def test_spilled_tensors_are_mapped_bit_for_bit(folder: Path) -> None:
    lm = tiny_lm()
    rows, prefixes = build_rows(lm, SETS, RECIPE)
    with Kept(lm.device, 0) as kept:
        mapped = teacher_targets(lm, rows, prefixes, kept)["states"]
        assert kept.in_file and kept.placed({"states": mapped})["states"] is mapped
    assert torch.equal(mapped, teacher_states(lm, rows, prefixes))


def test_spilled_with_checkpoints(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("checkpoints")
    expected = trained()
    for _ in range(2):  # the second time from the checkpoint
        again = trained(cache_bytes=0, checkpoints=Checkpoints(place))
        assert again[1] == expected[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_after_an_error(folder: Path, error: type[BaseException]) -> None:
    seen = []

    def stop(done: int, total: int) -> None:
        seen.extend(folder.rglob("*.safetensors"))
        raise error

    with pytest.raises(error):
        trained(cache_bytes=0, teacher_progress=stop)
    assert len(seen) == 1


def test_a_full_disk_is_one_line(folder: Path) -> None:
    """A limit on the size of files stands in for the disk: writing fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"do not fit into .*: make room, set TMPDIR"):
            trained(cache_bytes=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- micro-batches ---------------------------------------------------------------------------------------------------


def short_of(limit: int, monkeypatch: pytest.MonkeyPatch, module: object = loop) -> list[int]:
    """Makes every forward pass of more than `limit` tokens run out of memory; the sizes that were tried."""
    tried: list[int] = []
    hidden: Callable[..., torch.Tensor] = loop.LM.hidden

    def checked(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or module is teacher:
            tried.append(int(inputs["input_ids"].numel()))
            if tried[-1] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return hidden(model, **inputs)

    monkeypatch.setattr(loop.LM, "hidden", staticmethod(checked))
    return tried


@pytest.mark.parametrize("train", ["lora", "full"])
def test_halved_micro_batches_give_the_same_weights(monkeypatch: pytest.MonkeyPatch, train: str) -> None:
    recipe = RECIPE.but(train=train, batch_tokens=1000)  # one step an epoch
    monkeypatch.setattr(loop, "LINE_TOKENS", 1)
    monkeypatch.setattr(pairs, "SHAPE", 1)
    expected = trained(recipe)
    tried = short_of(60, monkeypatch)
    halved = trained(recipe)
    assert max(tried) > 60 and sum(size <= 60 for size in tried) >= 6
    assert close(expected[0], halved[0])
    assert halved[1] == pytest.approx(expected[1], rel=1e-5)


def test_a_backward_pass_that_fails_halfway_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained()
    calls = 0
    backward = torch.Tensor.backward

    def failing(self: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        backward(self)
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.Tensor, "backward", failing)
    assert close(expected[0], trained()[0])


def test_activations_are_computed_twice_only_when_a_row_alone_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained()
    asked: list[bool] = []
    hidden: Callable[..., torch.Tensor] = loop.LM.hidden

    def short_without(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if torch.is_grad_enabled():
            asked.append(base.is_activation_checkpointing)
            if not asked[-1]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return hidden(model, **inputs)

    monkeypatch.setattr(loop.LM, "hidden", staticmethod(short_without))
    done = inject(tiny_lm(), SETS, RECIPE)
    assert asked.count(False) >= 2 and asked == sorted(asked)
    assert close(expected[0], done.lm.model.state_dict())
    assert not done.lm.model.is_activation_checkpointing


def test_when_nothing_helps_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    short_of(5, monkeypatch)
    with pytest.raises(InjectionError, match="one sentence alone does not fit"):
        trained()


def test_a_long_row_between_short_ones_is_run_alone_and_computed_twice() -> None:
    class Model:
        def activation_checkpointing_enable(self, **_: object) -> None:
            pass

    micro, sizes, tried = Micro(Model()), [100, 10, 10], []

    def one(part: slice) -> None:
        tried.append(part)
        assert len(tried) < 20
        if sum(sizes[part]) >= 100 and not micro.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    micro.run(sizes, one, lambda: None)
    assert micro.recompute and micro.parts(sizes) == [slice(0, 3)]


def test_other_errors_are_not_taken_for_a_shortage() -> None:
    def broken(part: slice) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        Micro(None).run([3, 4], broken, lambda: None)


def test_the_teacher_scores_fewer_sentences_together(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    rows, prefixes = build_rows(lm, SETS, RECIPE)
    expected = teacher_states(lm, rows, prefixes)
    tried = short_of(70, monkeypatch, teacher)
    assert torch.allclose(teacher_states(lm, rows, prefixes), expected, atol=1e-5)
    assert max(tried) > 70


def test_flash_attention_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    rows, _ = build_rows(lm, SETS, RECIPE)
    total = sum(len(r.student) for r in rows)
    monkeypatch.setattr(loop, "LINE_TOKENS", 1)
    assert loop.line_width(lm, rows) < total
    monkeypatch.setattr(type(lm.model.config), "_attn_implementation", "flash_attention_2")
    packed = pack(rows, range(len(rows)), offsets(rows), loop.line_width(lm, rows), 0)
    assert len(packed.ids) == 1 and 0 <= packed.ids.numel() - total < pairs.SHAPE
    assert int((packed.position_ids == 0).sum()) == len(rows) + packed.ids.numel() - total


# --- held out --------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_related_and_not_trained_on() -> None:
    rows, _ = build_rows(tiny_lm(), SETS, RECIPE)
    learned, out = loop.divided(rows, RECIPE.but(held_out=0.3))
    assert len(out) == 2 and all(rows[i].related for i in out)
    assert sorted([*learned, *out]) == list(range(len(rows)))
    assert loop.divided(rows, RECIPE) == (list(range(len(rows))), [])
    everything, _ = loop.divided(rows, RECIPE.but(held_out=1.0))
    assert any(rows[i].related for i in everything)


def test_early_stop_waits_for_patience() -> None:
    assert not loop.done_early([], 1) and not loop.done_early([1.0, 0.9, 0.8], 1)
    assert not loop.done_early([1.0, 1.1], 2) and loop.done_early([1.0, 1.1, 1.0], 2)
    assert not loop.done_early([1.0, 1.1, 0.9], 2)


def test_training_stops_when_the_held_out_loss_rises(tmp_path: Path) -> None:
    recipe = RECIPE.but(held_out=0.3, patience=1, epochs=40, lr=0.1, train="full")
    done = inject(tiny_lm(), SETS, recipe).trained
    assert 2 <= len(done.held_out) == len(done.losses) < 40
    assert loop.done_early(done.held_out, 1) and not loop.done_early(done.held_out[:-1], 1)
    assert all(map(math.isfinite, done.held_out))
    assert inject(tiny_lm(), SETS, recipe, checkpoints=Checkpoints(tmp_path, every=0.0)).trained == done
    again = inject(tiny_lm(), SETS, recipe, checkpoints=Checkpoints(tmp_path)).trained  # from its last checkpoint
    assert again == done
