"""The benchmarks at their smallest: every way trains the same, FLOPs are counted, the page is rendered."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops, gpu, growth, reach, render, ways
from selfparam.inject import clock
from selfparam.inject.objective import Head, Words, loss_of
from selfparam.inject.pairs import build_rows, offsets, pack
from selfparam.lm import LM
from selfparam.steps import peak_memory_mb
from selfparam.types import PAPER, Context, Question, Recipe, Sentence, TargetSet
from tests.test_memory import SETS
from tests.tiny import tiny_lm

RECIPE = PAPER.but(epochs=2, lr=1e-2, batch_tokens=60, lora_dropout=0.0, precision="fp32")


def states(done: tuple[Any, float]) -> torch.Tensor:
    return torch.cat([p.flatten() for p in done[0].state_dict().values()])


def test_every_way_is_the_same_training() -> None:
    lm = tiny_lm()
    expected, loss = ways.ours(lm, SETS, RECIPE)
    for name, way in ways.WAYS.items():
        if name in ("TRL", "ours, top 64"):  # another order and mean; a coarser loss
            continue
        model, found = way(lm, SETS, RECIPE)
        assert found == pytest.approx(loss, rel=1e-3), name
        assert torch.allclose(states((model, found)), states((expected, loss)), atol=1e-3), name


@pytest.mark.skipif(not find_spec("trl"), reason="needs the extra 'bench'")
def test_trl_is_given_our_sentences_and_the_same_kl() -> None:
    """With a learning rate of next to zero the loss is the KL at the start, averaged over each sentence first."""
    lm = tiny_lm()
    still = RECIPE.but(lr=1e-30, epochs=1)
    rows, _ = build_rows(lm, SETS, still)
    one = [SETS[0].__class__(SETS[0].context, SETS[0].related[:1])]
    assert ways.trl(lm, one, still)[1] == pytest.approx(ways.ours(lm, one, still)[1], rel=1e-3)
    assert len(rows) == 8
    trained = ways.trl(lm, SETS, RECIPE)
    assert trained[1] < ways.trl(lm, SETS, still)[1]


def counted(lm: LM, recipe: Recipe) -> tuple[float, float]:
    """FLOPs of one pass with the next-word loss over all rows: torch's count, attention left out; share of padding."""
    rows, _ = build_rows(lm, SETS, recipe)
    packed = pack(rows, range(len(rows)), offsets(rows), 1, 0)
    assert packed.ids.numel() >= sum(len(r.student) for r in rows)
    head = Head(lm.model.get_output_embeddings().weight)
    lm.model.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        h = lm.hidden(lm.model, input_ids=packed.ids, position_ids=packed.position_ids).flatten(0, 1)
        h, weight = h[packed.index[packed.weight > 0]], packed.weight[packed.weight > 0]
        loss_of(h, head, Words(torch.zeros(len(h), dtype=torch.long)), weight).backward()
    counts = counter.get_flop_counts()["Global"].items()
    attention = sum(n for op, n in counts if "attention" in str(op) or "bmm" in str(op))
    return counter.get_total_flops() - attention, packed.ids.numel() / sum(len(r.student) for r in rows)


def test_flops_are_those_that_torch_counts() -> None:
    lm = tiny_lm()
    recipe = RECIPE.but(train="full", objective="next-word")
    rows, prefixes = build_rows(lm, SETS, recipe)
    teacher, epoch = flops.needed(lm, rows, prefixes, recipe)
    found, padding = counted(lm, recipe)
    assert found / padding <= 1.02 * epoch and epoch <= 1.02 * found
    kl = flops.needed(lm, *build_rows(lm, SETS, RECIPE), RECIPE)
    compact = flops.needed(lm, *build_rows(lm, SETS, RECIPE), RECIPE.but(top_k=4))
    assert compact[1] < kl[1] and compact[0] > kl[0] and teacher > 0
    assert flops.ceiling(torch.device("cpu"), torch.float32, seconds=0.0, size=64) > 0


def test_exponents() -> None:
    assert growth.exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1.0)
    assert growth.exponent([10, 100], [5, 500]) == pytest.approx(2.0)


def test_growth_is_measured_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert growth.wide_model(64, torch.device("meta")).device.type == "meta"
    lm = tiny_lm()
    monkeypatch.setattr(growth, "LM", SimpleNamespace(load=lambda: lm))
    monkeypatch.setattr(growth, "wide_model", lambda window, device: used.append(device) or lm)
    monkeypatch.setattr(growth, "timed", lambda *_: {"teacher": 1.0, "training": 1.0, "rows": 1})
    used: list[torch.device] = []
    found = growth.measure({"length": (100, 200)}, 1)
    assert used == [lm.device] and found["device"] == "cpu"


def test_random_sets_have_the_asked_size() -> None:
    lm = tiny_lm()
    sets = growth.random_sets(lm, 2, 50, 3)
    assert [len(one.related) for one in sets] == [3, 3]
    assert all(45 <= len(lm.encode(one.context.text)) <= 55 for one in sets)
    assert sets == growth.random_sets(lm, 2, 50, 3)


def test_shapes_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:
    """The GPU's script on a CPU with a tiny shape, and a page of made-up numbers beside its own."""
    monkeypatch.setattr(gpu, "ceiling", lambda device, dtype: 1e9)
    results, docs = tmp_path / "results", tmp_path / "docs"
    gpu.main(["--shapes", "tiny", "--contexts", "1", "--epochs", "1", "--device", "cpu", "--out",
              str(results / "gpu.json")])
    [found] = json.loads((results / "gpu.json").read_text())["gpu"]
    assert found["rows"] == 30 and found["seconds_training"] > 0 and found["utilisation_training"] > 0
    assert render.render(results, docs).count("not measured yet") == len(render.PARTS) - 1

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("too | short\nby far")

    with monkeypatch.context() as patched:  # what fails is noted, and what was measured before stays
        patched.setattr(gpu, "inject", fails)
        more = ["--shapes", "tiny", "--contexts", "8", "9", "--device", "cpu", "--out", str(results / "gpu.json")]
        gpu.main(more)
    first, *rest = json.loads((results / "gpu.json").read_text())["gpu"]
    assert first == found and [(e["contexts"], e["error"]) for e in rest] == [
        (n, "OutOfMemoryError: too | short") for n in (8, 9)]
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(gpu, "measure", lambda shape, n, recipe, device: asked.append((n, recipe.epochs)) or first)
    gpu.main([*more, "--contexts", "1", "8", "100"])
    assert asked == [(1, 50), (8, 50), (100, 5)]
    (results / "gpu.json").write_text(json.dumps({"device": "another", "torch": "1", "gpu": [first, *rest]}))
    with pytest.raises(SystemExit):
        gpu.main(more)
    assert "name another file" in capsys.readouterr().err
    row = {"seconds": [1.0, 3.0, 2.0], "cpu": 4.0, "loss": 0.1, "peak_mb": 10.0, "start_mb": 5.0, "tokens": 100,
           "flops": 1e9, "f1": [0.5, 0.7], "sentences": 4, "tokens_per_context": 300.0}
    machine = {"device": "cpu", "processor": "x", "threads": 1, "torch": "2", "ours": "float32", "ceiling": 1e9}
    for name in ("injection", "injection100", "injection_float32"):
        (results / f"{name}.json").write_text(json.dumps({
            "rows": {"ours": row, "plain": row | {"seconds": [20.0, 30.0, 40.0]}}, "contexts": 2, "epochs": 1,
            "model": "embedded", "machine": machine}))
    points = [{"size": n, "teacher": n / 10, "training": n / 5, "rows": n} for n in (10, 20)]
    (results / "growth.json").write_text(json.dumps({
        "growth": {"contexts": {"points": points, "exponent": {"teacher": 1.0, "training": 1.0}}}, "epochs": 1}))
    theirs = [{"epochs": 5, "seconds": 10.0, "f1": 0.5}, {"epochs": 10, "seconds": 20.0, "f1": 0.6}]
    own = [{"epochs": 2, "seconds": 1.0, "f1": 0.5}, {"epochs": 4, "seconds": 2.0, "f1": 0.7}]
    assert reach.ratios(theirs, own) == [10.0, 10.0] and reach.ratios(own, theirs) == [0.1, None]
    (results / "reach.json").write_text(json.dumps({
        "contexts": 2, "lr": 2e-3, "machine": machine, "paper": theirs, "ours": own,
        "tokens_a_step": {"paper": 90, "ours": 80}, "ratios": [10.0, None]}))
    text = render.render(results, docs)
    assert "| paper | 5 | 10.0 | 0.500 | 10 times |" in text and "| paper | 10 | 20.0 | 0.600 | - |" in text
    assert "A step of the paper's recipe has about 90 tokens, one of ours 80" in text
    assert "| tiny | 8 | failed: OutOfMemoryError: too / short |" in text
    assert "| plain | 30.0 | 15.00 | 4.0 | 3 | 3.3% |" in text and "| contexts | 10, 20 | 1.0, 2.0 |" in text
    assert "not measured yet" not in text and "| tiny | 1 | 1 |" in text
    assert (docs / "performance.md").read_text("utf-8") == text
    assert {p.name for p in docs.iterdir()} == {"performance.md", "performance.svg", "growth.svg"}


def test_both_recipes_are_followed_to_the_same_f1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lm = tiny_lm()
    x = Context("Mara keeps the red lamp on the hill.")
    sets = [TargetSet(x, (Sentence("Who keeps it?", "Mara", x.id),), (Sentence("", "The boat came back."),))]
    monkeypatch.setattr(reach.LM, "load", lambda model: lm)
    monkeypatch.setattr(reach, "target_sets", lambda lm, contexts: (sets, [[Question("Who keeps it?", ("Mara",))]]))
    monkeypatch.setattr(reach, "machine", lambda model: {})
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    reach.main(["--contexts", "1", "--epochs", "5", "--every", "2", "--out", str(tmp_path / "reach.json")])
    found = json.loads((tmp_path / "reach.json").read_text())
    assert [p["epochs"] for p in found["paper"]] == [2, 4, 5]
    assert all(p["seconds"] > 0 and 0 <= p["f1"] <= 1 for p in found["paper"] + found["ours"])
    assert found["ours"][-1]["f1"] >= found["paper"][-1]["f1"] or len(found["ours"]) == len(reach.EPOCHS)
    sizes = found["tokens_a_step"]
    assert sizes["paper"] == sizes["ours"] > 0
    assert reach.paper_recipe(1.0, 1, 1024) == PAPER.but(lr=1.0, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())


def test_a_gpu_is_waited_for_and_its_own_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 1e6 * (device.index + 1))
    second = torch.device("cuda:1")
    assert clock(second) > 0 and clock(torch.device("cpu")) > 0 and waited == [second]
    assert peak_memory_mb(second) == 2 and peak_memory_mb(torch.device("cpu")) > 10


def test_shapes_are_the_published_ones() -> None:
    for name, billions in (("llama-3-8b", 8.03), ("mistral-7b", 7.24)):
        with torch.device("meta"):
            model = gpu.AutoModelForCausalLM.from_config(gpu.SHAPES[name])
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
