"""What holds earlier injections: moments against their definition, the penalty against autograd, and that it holds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from selfparam.errors import InjectionError, ModelError
from selfparam.inject import inject
from selfparam.inject.curvature import MOST, Curvature, Held, measure, strongest
from selfparam.inject.pairs import build_rows
from selfparam.inject.stack import inject_each
from selfparam.inject.teacher import teacher_states
from selfparam.inject.trainable import layer_linears, make_trainable
from selfparam.lm import LM, Conv1D
from selfparam.methods import make_method
from selfparam.own import own_sentences
from selfparam.types import SMALL, SMALL_SEQUENTIAL, Context, Sentence, TargetSet
from tests.tiny import tiny_lm

X = Context("Mara keeps the red lamp in Oslo.")
SET = TargetSet(X, (Sentence("Who keeps the red lamp?", "Mara", X.id), Sentence("Where is the lamp?", "Oslo", X.id)))
OTHER = TargetSet(Context("The green door is locked."), (Sentence("Which door is locked?", "the green one", "door"),))
EXACT = SMALL.but(precision="fp32", epochs=4)
ARCHITECTURES = ["llama", "gpt2", "phi", "gemma2", "lfm2"]


def rows_of(lm: LM, one: TargetSet = SET) -> Any:
    return build_rows(lm, [one], SMALL)[0]


def moments_of(found: Curvature) -> dict[str, torch.Tensor]:
    """C of every matrix."""
    return {n: f.T @ f for n, f in found.directions.items()}


@pytest.mark.parametrize("name", [*ARCHITECTURES, "opt"])  # OPT's MLP sees no lines
def test_moments_as_defined(name: str) -> None:
    lm = tiny_lm(name)
    rows = rows_of(lm)
    moments = moments_of(measure(lm, rows, seed=3))
    assert set(moments) == {n for group in layer_linears(lm) for n in group}
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    # by hand: each row alone and without padding, the same random directions
    rng = torch.Generator().manual_seed(3)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].student))
    places = sum(rows[i].scored for i in order)
    d = lm.text_config.hidden_size
    r = list(torch.randn(-(-places // 64) * 64, d, generator=rng).split([rows[i].scored for i in order] + [
        -places % 64]))
    wanted = {n: torch.zeros_like(m) for n, m in moments.items()}
    for i, direction in zip(order, r, strict=False):
        kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def look(module: Any, given: Any, y: torch.Tensor, kept: Any = kept) -> None:
            y.retain_grad()
            kept[next(n for n, m in lm.model.named_modules() if m is module)] = (given[0], y)

        hooks = [lm.model.get_submodule(n).register_forward_hook(look) for n in moments]
        h = lm.hidden(lm.model, input_ids=torch.tensor([rows[i].student]))
        (h[0, rows[i].first - 1 : -1] * direction).sum().backward()
        for hook in hooks:
            hook.remove()
        for n, (x, y) in kept.items():
            assert y.grad is not None
            x, gradient = x.flatten(0, -2), y.grad.flatten(0, -2)
            wanted[n] += (x * gradient.square().mean(1, keepdim=True)).T @ x
    for n, m in moments.items():
        torch.testing.assert_close(m, wanted[n].detach(), rtol=2e-3, atol=1e-4 * float(wanted[n].detach().abs().max()))


def test_the_last_matrix_moves_the_states_by_what_the_moment_says() -> None:
    lm = tiny_lm()
    rows, prefixes = build_rows(lm, [SET], SMALL)
    name = layer_linears(lm)[1][-1]  # nothing lies between it and the states but the final norm: no sums over tokens
    module = lm.model.get_submodule(name)
    expected = sum(moments_of(measure(lm, rows, seed))[name] for seed in range(40)) / 40
    before = teacher_states(lm, rows, [lm.prefix(None)] * len(prefixes))
    torch.manual_seed(0)
    moved = predicted = 0.0
    for _ in range(40):
        change = 1e-3 * torch.randn_like(module.weight)
        with torch.no_grad():
            module.weight += change
            moved += float((teacher_states(lm, rows, [lm.prefix(None)] * len(prefixes)) - before).square().sum())
            module.weight -= change
        predicted += float(((change @ expected) * change).sum())
    assert moved == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("train", ["lora", "mlp"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_of_the_penalty(name: str, train: str) -> None:
    lm = tiny_lm(name)
    recipe = SMALL.but(train=train, retention=0.7, lora_rank=4)
    curvature = measure(lm, rows_of(lm))
    moments = moments_of(curvature)
    model = make_trainable(lm, recipe)
    held = Held(model, curvature, recipe)
    torch.manual_seed(0)
    start = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p += 0.1 * torch.randn_like(p)
    held.add_gradients(5.0)
    found = [p.grad.clone() for p in trained if p.grad is not None]
    assert len(found) == len([p for p in trained if p.ndim == 2]) > 0
    model.zero_grad()
    penalty = torch.zeros(())
    for n, m in model.named_modules():
        short = n.removeprefix("base_model.model.")
        if short not in moments:
            continue
        if train == "lora":
            change = m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight
        elif m.weight.requires_grad:
            change = m.weight - start[n]
            change = change.T if isinstance(m, Conv1D) else change
        else:
            continue
        penalty = penalty + ((change @ moments[short]) * change).sum()
    (0.7 / (2 * 5.0) * penalty).backward()
    wanted = [p.grad for p in trained if p.ndim == 2]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6 + 1e-4 * float(b.abs().max()))
               for a, b in zip(found, wanted, strict=True) if b is not None)


def test_what_is_held_weighs_no_more_than_some_times_what_is_learned() -> None:
    lm = tiny_lm()
    recipe = SMALL.but(train="mlp", retention=1.0)
    found = measure(lm, rows_of(lm))
    assert found.scored == sum(r.scored for r in rows_of(lm))
    assert measure(lm, rows_of(lm), before=found).scored == 2 * found.scored

    def gradient(scored_before: int, scored: float) -> torch.Tensor:
        model = make_trainable(lm, recipe)
        held = Held(model, Curvature(found.directions, scored_before), recipe)
        module = held.layers[0][0]
        with torch.no_grad():
            module.weight += 0.1
            held.add_gradients(scored)
            module.weight -= 0.1
        given, module.weight.grad = module.weight.grad, None
        return given

    one = gradient(int(5 * MOST), 5.0)
    torch.testing.assert_close(gradient(0, 5.0), one)  # of a file that does not say
    torch.testing.assert_close(gradient(int(10 * MOST), 5.0), one / 2)
    torch.testing.assert_close(gradient(int(10 * MOST), 20.0), one / 4)


def test_a_first_injection_is_as_without_it_and_a_second_is_held() -> None:
    lm = tiny_lm()
    plain = inject(lm, [SET], EXACT)
    one = inject(lm, [SET], EXACT.but(retention=1.0))
    assert plain.curvature is None and one.curvature is not None
    assert all(torch.equal(a, b) for a, b in zip(one.lm.model.parameters(), plain.lm.model.parameters(), strict=True))

    rows, prefixes = build_rows(lm, [SET], SMALL)
    empty = [lm.prefix(None)] * len(prefixes)
    before = teacher_states(one.lm, rows, empty)

    def moved(strength: float) -> tuple[float, Any]:
        two = inject(one.lm, [OTHER], EXACT.but(retention=strength), curvature=one.curvature)
        return float((teacher_states(two.lm, rows, empty) - before).square().sum()), two

    free, little, much = moved(0.0), moved(1.0), moved(1e4)
    assert much[0] < 0.1 * free[0] and little[0] < free[0]
    assert free[1].curvature is None
    both = moments_of(measure(little[1].lm, rows_of(lm, OTHER), EXACT.seed))
    found, held = moments_of(little[1].curvature), moments_of(one.curvature)
    assert all(torch.allclose(found[n], m + held[n], rtol=1e-3, atol=1e-5 * float(found[n].abs().max()))
               for n, m in both.items())


def test_the_strongest_directions_are_kept() -> None:
    torch.manual_seed(0)
    for n, d in ((5, 3), (40, 12), (12, 40), (9, 9)):
        rows = torch.randn(n, d) * torch.logspace(0, -3, d)
        whole = strongest(rows, d)
        torch.testing.assert_close(whole.T @ whole, rows.T @ rows)
        _, sizes, v = torch.linalg.svd(rows, full_matrices=False)
        few = strongest(rows, 3)
        assert few.shape == (3, d)
        torch.testing.assert_close(strongest(torch.cat([rows, torch.zeros(300, d), rows]), d).square().sum(),
                                   2 * rows.square().sum())
        torch.testing.assert_close(few.T @ few, (v[:3].T * sizes[:3].square()) @ v[:3], rtol=1e-3, atol=1e-4)


def test_its_size_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    room = importlib.import_module("selfparam.inject.curvature")
    monkeypatch.setattr(room, "TOKENS", 1)  # a row at a time
    monkeypatch.setattr(room, "strongest", lambda rows: strongest(rows, 4))
    found = None
    for _ in range(2):
        found = measure(lm, rows_of(lm), before=found)
        assert all(len(f) == 4 for f in found.directions.values())
        assert found.numbers == 4 * sum(f.shape[1] for f in found.directions.values())


def test_fewer_rows_are_read_together_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, room = tiny_lm(), importlib.import_module("selfparam.inject.curvature")
    rows = [*rows_of(lm), *rows_of(lm)]
    longest = max(len(r.student) for r in rows)
    monkeypatch.setattr(room, "TOKENS", 2 * longest)
    expected = moments_of(measure(lm, rows))
    monkeypatch.setattr(room, "TOKENS", 4 * longest)
    tried, hidden = [], LM.hidden

    def short(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
        tried.append(len(inputs["input_ids"]))
        found = hidden(model, **inputs)  # the hooks are there already
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    monkeypatch.setattr(LM, "hidden", staticmethod(short))
    limit = 2
    found = moments_of(measure(lm, rows))
    assert tried[0] == 4 and set(tried[1:]) == {2}
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment)
    limit = 0
    with pytest.raises(InjectionError, match="one sentence alone does not fit"):
        measure(lm, rows)


def test_sums_are_float32_where_training_is_not() -> None:
    one = inject(tiny_lm(), [SET], EXACT.but(retention=1.0, precision="bf16"))
    assert one.curvature and {f.dtype for f in one.curvature.directions.values()} == {torch.float32}
    two = inject(one.lm, [OTHER], EXACT.but(retention=1.0, precision="bf16"), curvature=one.curvature)
    assert two.curvature and {f.dtype for f in two.curvature.directions.values()} == {torch.float32}


def test_files(tmp_path: Path) -> None:
    lm = tiny_lm()
    found = measure(lm, rows_of(lm))
    path = tmp_path / "moments.safetensors"
    found.save(path)
    again = Curvature.load(path)
    assert set(again.directions) == set(found.directions) and again.scored == found.scored > 0
    assert all(torch.equal(again.directions[n], f) for n, f in found.directions.items())
    assert 4 * found.numbers < path.stat().st_size < 4 * found.numbers + 10_000
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="cannot be read"):
        Curvature.load(path)
    with pytest.raises(ModelError, match="cannot be read"):
        Curvature.load(tmp_path / "none")


def test_what_cannot_be_held_is_refused() -> None:
    lm, other = tiny_lm(), tiny_lm("gpt2")
    found = inject(lm, [SET], EXACT.but(retention=1.0)).curvature
    assert found
    with pytest.raises(InjectionError, match="of another model"):
        inject(other, [SET], EXACT.but(retention=1.0), curvature=found)
    small = Curvature({n: f[:, :4] for n, f in found.directions.items()})
    with pytest.raises(InjectionError, match="of another model"):
        inject(lm, [SET], EXACT.but(retention=1.0), curvature=small)
    with pytest.raises(InjectionError, match="'lora' or 'mlp'"):
        inject(lm, [SET], EXACT.but(retention=1.0, train="full"))  # the first one, too: what follows could not be held


def test_a_fold_carries_it_and_stores_no_text() -> None:
    lm = tiny_lm()
    method = make_method("selfparam", {"recipe": {"from": "small", "epochs": 1, "retention": 1.0, "precision": "fp32"},
                                       "ratio": 0.0})
    one = method.absorb(lm, [SET])
    two = method.absorb(lm, [OTHER], after=one)
    assert two.storage_tokens == 0 and "numbers of curvature" in two.notes[0]
    by_hand = inject(one.lm, [OTHER], EXACT.but(epochs=1, retention=1.0), curvature=one.curvature).lm
    assert all(torch.equal(a, b) for a, b in zip(two.lm.model.parameters(), by_hand.model.parameters(), strict=True))
    assert method.absorb(lm, [TargetSet(X, ())], after=two).curvature is two.curvature
    assert SMALL_SEQUENTIAL.retention > 0 == SMALL.retention


def test_what_the_model_writes_itself_is_held_from_the_first_injection_on() -> None:
    lm = tiny_lm()
    known = (Sentence("Who rows the boat?", "Ann Lee"), Sentence("", "The mill stands by the river."))
    own = TargetSet(Context(""), (), known)
    rows, prefixes = build_rows(lm, [own], SMALL)
    empty = [lm.prefix(None)] * len(prefixes)
    before = teacher_states(lm, rows, empty)

    def moved(strength: float) -> tuple[float, Any]:
        done = inject(lm, [SET], EXACT.but(retention=strength), known=known)
        return float((teacher_states(done.lm, rows, empty) - before).square().sum()), done.curvature

    free, much = moved(1e-9), moved(1e3)
    assert much[0] < 0.2 * free[0]
    assert moved(0.0)[1] is None
    learned = sum(r.scored for r in rows_of(lm))
    assert much[1].scored == 2 * learned  # the set's pairs, and known sentences that weigh as much
    held = moments_of(measure(lm, rows, EXACT.seed).weighing(learned))
    found = moments_of(free[1])
    assert all(float((found[n] - m).trace()) > 0 for n, m in held.items())
    again = inject(lm, [SET], EXACT.but(retention=1.0), curvature=much[1])  # the curvature has them already
    both = inject(lm, [SET], EXACT.but(retention=1.0), curvature=much[1], known=known)
    assert again.trained.losses == both.trained.losses


@pytest.mark.parametrize("known", [0, 4])
def test_a_recipe_asks_for_what_the_model_knows_once(monkeypatch: pytest.MonkeyPatch, known: int) -> None:
    lm, asked = tiny_lm(), []
    recipe = {"from": "small", "epochs": 1, "retention": 1.0, "known": known, "precision": "fp32"}
    module = importlib.import_module("selfparam.inject")

    def sentences(given: LM, recipe: Any) -> list[Sentence]:
        found = own_sentences(given, recipe)
        asked.append(len(found))
        return found

    monkeypatch.setattr(module, "own_sentences", sentences)
    method = make_method("selfparam", {"recipe": recipe, "ratio": 0.0})
    assert getattr(method, "stacks") == (not known)  # noqa: B009 (only some methods can)
    reader = method.absorb(lm, [SET])
    reader = method.absorb(lm, [OTHER], after=reader)
    assert len(asked) == 1 and (asked[0] > 0) == (known > 0)
    if known:
        with pytest.raises(InjectionError, match="one injection at a time"):
            next(inject_each(lm, [SET], getattr(method, "recipe")))  # noqa: B009
