"""The core against independent computations: float64 equations, joined rows, unpacked rows, every architecture."""

from __future__ import annotations

import copy
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import normalizers
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from selfparam.errors import InjectionError, ModelError, OutputError, StoppedError
from selfparam.inject import inject, objective
from selfparam.inject.checkpoint import Checkpoints, Position
from selfparam.inject.loop import check_finite
from selfparam.inject.objective import Head, kl, kl_tokens, next_word
from selfparam.inject.pairs import SHAPE, STEPS, WORD, Row, build_rows, epoch_steps, offsets, pack
from selfparam.inject.stack import inject_each
from selfparam.inject.teacher import check_head, check_model, check_rows, head_of, teacher_states
from selfparam.inject.trainable import (
    Float32Muon,
    experts,
    layer_linears,
    lora_targets,
    make_optimizers,
    multiplies_bf16,
)
from selfparam.lm import LM
from selfparam.store.directory import write_adapter
from selfparam.types import PAPER, SMALL, Context, Recipe, Sentence, TargetSet
from tests.tiny import APART, EXPERTS, KINDS, tiny_lm

FAST = PAPER.but(lr=1e-2, epochs=12, lora_dropout=0.0, precision="fp32", batch_tokens=64)


def a_set(unrelated: bool = True) -> TargetSet:
    x = Context("The red lamp stands on the hill. Its keeper is Mara and the light was built in 1911.", title="lamp")
    related = (
        Sentence("Who keeps the lamp?", "Mara", x.id),
        Sentence("When was the light built?", "1911", x.id),
        Sentence("Where does it stand?", "on the hill", x.id),
    )
    plain = (Sentence("", "The boat came back in the evening.", None), Sentence("Who sails?", "Tom", None))
    return TargetSet(x, related, plain if unrelated else ())


# --- the objective against float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_kl_and_its_gradients_equal_float64_autograd(softcap: float | None, with_bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    n, d, v = 37, 8, 50
    h, t = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g).requires_grad_()
    bias = torch.randn(v, generator=g).requires_grad_() if with_bias else None
    w = torch.rand(n, generator=g)
    student = h.clone().requires_grad_()
    frozen = Head(weight.detach().clone(), None if bias is None else bias.detach().clone(), softcap)
    loss = kl(student, Head(weight, bias, softcap), t, frozen, w)
    loss.backward()

    def logits(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        raw = x @ a.T + (0 if b is None else b)
        return torch.tanh(raw / softcap) * softcap if softcap else raw

    h64 = h.double().requires_grad_()
    w64 = weight.detach().double().requires_grad_()
    b64 = None if bias is None else bias.detach().double().requires_grad_()
    p = logits(t.double(), w64.detach(), None if b64 is None else b64.detach()).softmax(-1)
    q = logits(h64, w64, b64).log_softmax(-1)
    expected = (w.double() * F.kl_div(q, p, reduction="none").sum(-1)).sum()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(student.grad.double(), h64.grad, atol=1e-5)
    assert torch.allclose(weight.grad.double(), w64.grad, atol=1e-4)
    if bias is not None and b64 is not None:
        assert torch.allclose(bias.grad.double(), b64.grad, atol=1e-4)


def test_next_word_equals_cross_entropy() -> None:
    h, weight = torch.randn(9, 6, requires_grad=True), torch.randn(20, 6)
    targets, w = torch.randint(0, 20, (9,)), torch.rand(9)
    loss = next_word(h, Head(weight), targets, w)
    loss.backward()
    other = h.detach().clone().requires_grad_()
    expected = (w * F.cross_entropy(other @ weight.T, targets, reduction="none")).sum()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(h.grad, other.grad, atol=1e-6)


def test_kl_is_zero_for_equal_states_and_chunks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    h, head = torch.randn(30, 8), Head(torch.randn(40, 8))
    assert float(kl(h, head, h, head, torch.ones(30))) == 0.0
    t = torch.randn(30, 8)
    whole = kl(h, head, t, head, torch.ones(30))
    monkeypatch.setattr(objective, "CHUNK", 7)
    assert float(kl(h, head, t, head, torch.ones(30))) == pytest.approx(float(whole), rel=1e-6)


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_prefilled_equals_joined(kind: str, chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """States on the shared cache of x are those of the joined row x + s, for every architecture, however often."""
    lm = tiny_lm(kind, chat=chat)
    check_head(lm)
    rows, prefixes = build_rows(lm, [a_set()], PAPER)
    states = teacher_states(lm, rows, prefixes)
    for row, start in zip(rows, offsets(rows), strict=True):
        ids = torch.tensor([[*prefixes[row.prefix], *row.s]])
        joined = lm.hidden(lm.model, input_ids=ids)[0, -row.scored - 1 : -1]
        assert torch.allclose(states[start : start + row.scored], joined, atol=2e-5), kind
    # one sentence at a time; x is read once all the same
    monkeypatch.setattr(import_module("selfparam.inject.teacher"), "CPU_SENTENCE_TOKENS", 1)
    cached, read = LM.prefix_cache, []
    monkeypatch.setattr(LM, "prefix_cache", lambda self, ids: read.append(ids) or cached(self, ids))
    assert torch.allclose(teacher_states(lm, rows, prefixes), states, atol=2e-5), kind
    assert len(read) == sum(len(ids) > 1 for ids in prefixes) < len(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_unpacked(kind: str) -> None:
    lm = tiny_lm(kind)
    rows, _ = build_rows(lm, [a_set()], PAPER)
    starts = offsets(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed = pack(rows, range(len(rows)), starts, 100, 0)
    assert packed.ids.shape[1] % SHAPE == 0 and len(packed.index) % SHAPE == 0
    packed = pack(rows, range(len(rows)), starts, 100, 0)
    assert len(packed.ids) < len(rows) and packed.ids.shape[1] % WORD == 0 and len(packed.index) % WORD == 0
    assert packed.ids.numel() - sum(len(r.student) for r in rows) < 2 * WORD * len(packed.ids)
    with torch.no_grad():
        h = lm.hidden(lm.model, input_ids=packed.ids, position_ids=packed.position_ids).flatten(0, 1)[packed.index]
        for row, start in zip(rows, starts, strict=True):
            alone = lm.hidden(lm.model, input_ids=torch.tensor([row.student]))[0, row.first - 1 : -1]
            mine = h[(packed.source >= start) & (packed.source < start + row.scored) & (packed.weight > 0)]
            assert torch.allclose(mine, alone, atol=2e-5), kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_told_apart(kind: str, dtype: torch.dtype) -> None:
    lm = tiny_lm(kind)
    lm.model.to(dtype).train()  # as it is found, so it is left
    check_rows(lm)
    assert lm.model.training


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("train", ["lora", "mlp", "full"])
def test_rows_that_cannot_be_packed_are_read_apart(kind: str, train: str) -> None:
    """Recurrent layers and positions that tell nothing apart: the loss is the model's own, one row after another."""
    lm = tiny_lm(kind)
    own, scored = 0.0, 0
    rows, prefixes = build_rows(lm, [a_set()], FAST)
    with torch.no_grad():
        for row in rows:
            says = [lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -row.scored - 1 : -1]
                    for ids in ([*prefixes[row.prefix], *row.s], row.student)]
            teacher, student = (logits.log_softmax(-1) for logits in says)
            own += float(F.kl_div(student, teacher, reduction="sum", log_target=True))
            scored += row.scored
    still = inject(lm, [a_set()], FAST.but(train=train, lr=1e-9, epochs=1, batch_tokens=10_000))
    assert lm.apart and still.lm.apart
    assert still.trained.losses[0] == pytest.approx(own / scored, rel=1e-3)
    done = inject(lm, [a_set()], FAST.but(train=train))
    assert done.trained.losses[-1] < 0.8 * done.trained.losses[0], (kind, train, done.trained.losses)
    assert done.merge_error < 1e-4


@pytest.mark.parametrize("kind", APART)
def test_texts_that_cannot_be_packed_are_written_together(kind: str) -> None:
    lm, questions = tiny_lm(kind), ["Who keeps the lamp?", "When was the light on the hill built by Mara?", "Why?"]
    x = a_set().context.text
    assert lm.answer(questions, x, max_new_tokens=6) == [lm.answer([q], x, max_new_tokens=6)[0] for q in questions]


def test_a_model_that_reads_backwards_is_refused() -> None:
    lm = tiny_lm("llama")
    config = CONFIG_MAPPING["bert"](hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
                                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                                    vocab_size=len(lm.tokenizer))
    lm.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for injected in (lambda: inject(lm, [a_set()], FAST), lambda: next(inject_each(lm, [a_set()], FAST))):
        with pytest.raises(ModelError, match="reads what stands behind a word"):
            injected()


def test_matrices_beside_a_convolution_count_as_attention() -> None:
    attention, mlp = layer_linears(tiny_lm("lfm2"))
    assert [n.rsplit(".", 2)[-2:] for n in attention if ".conv." in n] == [["conv", "in_proj"]]
    assert mlp and all("feed_forward" in name for name in mlp)


def test_a_head_of_another_width_is_refused() -> None:
    lm = tiny_lm("llama")
    config = CONFIG_MAPPING["electra"](hidden_size=32, num_hidden_layers=1, num_attention_heads=4, embedding_size=16,
                                       vocab_size=len(lm.tokenizer), is_decoder=True)
    lm.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(ModelError, match="more than a linear head"):
        inject(lm, [a_set()], FAST)


def test_a_model_that_is_left_in_training_with_dropout_is_checked_without_it() -> None:
    lm = tiny_lm("gpt2")
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    lm.model.train()
    check_model(lm, FAST)
    assert lm.model.training


def test_names_of_special_tokens_in_texts_are_words() -> None:
    lm = tiny_lm("llama", chat=True)
    hostile, special = "a<|end|><|user|>b", set(lm.tokenizer.all_special_ids)
    assert lm.decode(lm.encode(hostile)) == hostile
    plain, mixed = ([*lm.prefix(text), *lm.sentence(Sentence(text, text, "x"))[0]] for text in ("ab", hostile))
    assert [i for i in mixed if i in special] == [i for i in plain if i in special] != []


def test_the_tokenizer_of_mistral_common_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With that package and a tekken.json transformers would take it, and it refuses to split special tokens."""
    load, given = AutoTokenizer.from_pretrained, []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path, **how: given.append(how) or load(path, **how))
    tiny_lm("mistral").save(tmp_path)
    assert LM.load(str(tmp_path)).encode("<|end|>") and given[0]["mistral_format"] is False


def test_a_hybrid_template_does_not_think_and_one_without_the_words_is_refused() -> None:
    lm = tiny_lm("llama", chat=True)
    lm.tokenizer.chat_template += "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    assert lm.decode(lm.chat_parts()[1]) == lm.decode(lm.chat_parts()[2]) == ""
    lm = tiny_lm("llama", chat=True)
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace("<|user|>{{ message.content }}", "<|user|>")
    with pytest.raises(ModelError, match="repair the template"):
        lm.chat_parts()


def test_an_answer_begins_as_in_the_whole_text() -> None:
    lm = tiny_lm("llama")
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")  # as older sentencepiece tokenizers do
    ids, prompt = lm.sentence(Sentence("Who keeps the lamp?", "Mara", "x"))
    assert ids == lm.encode("Question: Who keeps the lamp?\nAnswer: Mara\n")
    assert ids[:prompt] == lm.question("Who keeps the lamp?")


def test_same_ids_on_both_sides_and_answers_only() -> None:
    lm = tiny_lm("llama", chat=True)
    rows, prefixes = build_rows(lm, [a_set()], PAPER)
    for row in rows:
        assert row.student[-len(row.s) :] == row.s
    assert len(prefixes) == 2  # with x: in front of a chat turn, in front of plain text
    short, free = build_rows(lm, [a_set()], PAPER.but(loss_on="answer", teacher_sees_x=False))
    assert sum(r.scored for r in short) < sum(r.scored for r in rows)
    assert len(free) == 3  # x for the pairs; nothing for unrelated pairs and text
    mara = short[0].student[short[0].first :]
    assert lm.decode(mara) == "Mara"


def test_the_schedule_ends_with_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are long against a step, epochs differ in their number of steps; also after a stop."""
    x = Context("The lamp.")
    sets = [TargetSet(x, tuple(Sentence("Who?", "Mara " * (1 + 9 * (i % 3)), x.id) for i in range(12)))]
    recipe = FAST.but(epochs=6, schedule="linear", batch_tokens=40)
    rows, _ = build_rows(tiny_lm("llama"), sets, recipe)
    rng = random.Random(recipe.seed)
    each = [len(epoch_steps(rows, recipe, rng)) for _ in range(recipe.epochs)]
    assert len(set(each)) > 1
    module, taken = import_module("selfparam.inject.loop"), []
    apply = module.apply

    class Stops(Checkpoints):
        def after_step(self, at: Position, last: bool) -> None:
            self.stop = at.step == each[0] + 2
            super().after_step(at, last)

    monkeypatch.setattr(module, "apply", lambda optimizers, lr: (taken.append(lr), apply(optimizers, lr)))
    with pytest.raises(StoppedError):
        inject(tiny_lm("llama"), sets, recipe, checkpoints=Stops(tmp_path, every=1e9))
    done = inject(tiny_lm("llama"), sets, recipe, checkpoints=Checkpoints(tmp_path))
    assert done.trained.steps == sum(each)
    assert taken == pytest.approx([recipe.lr * (1 - i / sum(each)) for i in range(sum(each))])
    monkeypatch.setattr(import_module("selfparam.inject.stack"), "apply", module.apply)
    taken.clear()
    next(inject_each(tiny_lm("llama"), sets, recipe))
    assert taken == pytest.approx([recipe.lr * (1 - i / sum(each)) for i in range(sum(each))])


def test_steps_use_every_row_once() -> None:
    lm = tiny_lm("llama")
    rows, _ = build_rows(lm, [a_set()], PAPER)
    steps = epoch_steps(rows, PAPER.but(batch_tokens=40), random.Random(1))
    assert sorted(i for s in steps for i in s) == list(range(len(rows)))
    assert len(steps) > 1


def test_long_epochs_take_larger_steps() -> None:
    rows = [Row((1,) * 10, 1, 0, (1,), 1.0, related=True) for _ in range(400)]

    def steps(recipe: Recipe, of: list[Row]) -> int:
        return len(epoch_steps(of, recipe, random.Random(0)))

    fixed = PAPER.but(batch_tokens=40)
    growing = fixed.but(most_batch_tokens=500)
    assert steps(fixed, rows) == 100 and steps(growing, rows) == STEPS
    assert steps(growing, rows[:40]) == steps(fixed, rows[:40]) == 10  # a short epoch stays as it is
    assert steps(fixed.but(most_batch_tokens=100), rows) == 40
    assert steps(fixed.but(most_batch_tokens=20), rows) == 100


# --- the whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", ["lora", "mlp", "full"])
def test_injection_lowers_the_kl_and_leaves_the_teacher_alone(kind: str, train: str) -> None:
    lm = tiny_lm(kind)
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    done = inject(lm, [a_set()], FAST.but(train=train))
    assert done.trained.losses[-1] < 0.8 * done.trained.losses[0], (kind, train, done.trained.losses)
    assert all(torch.equal(v, lm.model.state_dict()[k]) for k, v in before.items())
    assert done.merge_error < 1e-4
    changed = {k for k, v in done.lm.model.state_dict().items() if not torch.equal(v, before[k])}
    attention, mlp = layer_linears(lm)
    wanted = {"lora": {*attention, *mlp}, "mlp": set(mlp)}.get(train)
    if wanted is not None:
        assert {k.removesuffix(".weight").removesuffix(".bias") for k in changed} == wanted


@pytest.mark.parametrize("kind", [*KINDS, *APART, *EXPERTS])
def test_bf16_trains_too(kind: str) -> None:
    done = inject(tiny_lm(kind), [a_set()], FAST.but(precision="bf16"))
    assert done.trained.losses[-1] < 0.8 * done.trained.losses[0]


@pytest.mark.parametrize("train", ["mlp", "full", "osf"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_trained_in_float32(train: str, kind: torch.dtype) -> None:
    found = []
    for short in (True, False):
        lm = tiny_lm("llama")
        for p in lm.model.parameters():
            p.data = p.data.to(kind)
            p.data = p.data if short else p.data.float()
        done = inject(lm, [a_set()], FAST.but(train=train, lr=1e-4))
        assert {p.dtype for p in done.lm.model.parameters()} == {kind if short else torch.float32}
        assert done.lm.model.model.rotary_emb.inv_freq.dtype == torch.float32
        found.append(done.trained.losses)
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0][-1] < found[0][0]


def test_muon_in_float32_is_torchs() -> None:
    torch.manual_seed(0)
    start = [torch.randn(*shape) for shape in ((24, 8), (8, 24), (16, 16))]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(4)]
    found = []
    for kind in (torch.optim.Muon, Float32Muon):
        own = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = kind(own, lr=0.05, weight_decay=0.1)
        for some in gradients:
            for p, gradient in zip(own, some, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
        found.append((own, optimizer.state_dict()))
    (theirs, state), (ours, own_state) = found
    for a, b, p in zip(theirs, ours, start, strict=True):
        assert float((a.detach() - p).abs().max()) > 0.1
        torch.testing.assert_close(b, a, atol=0.02, rtol=0)  # theirs rounds to bf16
    assert state["param_groups"] == own_state["param_groups"]
    assert all(torch.equal(state["state"][i]["momentum_buffer"], one["momentum_buffer"])
               for i, one in own_state["state"].items())
    p = torch.nn.Parameter(torch.zeros(6, 20))
    p.grad = torch.randn(6, 20) * 1e-4
    Float32Muon([p], lr=1.0, weight_decay=0.0).step()
    assert all(0.5 < s < 1.5 for s in torch.linalg.svdvals(p))  # a step's size does not depend on the gradient's


def test_muon_is_torchs_where_bf16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda it=amx: it)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda it=avx: it)
        fast = amx or avx
        [optimizer] = make_optimizers([torch.nn.Parameter(torch.zeros(3, 4))], SMALL.but(optimizer="muon"))
        assert type(optimizer) is (torch.optim.Muon if fast else Float32Muon)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("train", ["lora", "mlp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_are_trained(kind: str, train: str, precision: str, tmp_path: Path) -> None:
    lm = tiny_lm(kind)
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    done = inject(lm, [a_set()], FAST.but(train=train, precision=precision), keep_adapter=True)
    assert done.trained.losses[-1] < 0.8 * done.trained.losses[0], done.trained.losses
    assert done.merge_error < 1e-4
    assert all(torch.equal(v, lm.model.state_dict()[k]) for k, v in before.items())
    changed = {k for k, v in done.lm.model.state_dict().items() if not torch.equal(v, before[k])}
    attention, _ = layer_linears(lm)
    assert len(experts(lm)) == 4
    assert changed == {*experts(lm), *([f"{name}.weight" for name in attention] if train == "lora" else [])}
    if train == "lora":
        write_adapter(tmp_path / "adapter", *done.adapter)
        adapted = PeftModel.from_pretrained(lm.model, tmp_path / "adapter").eval()
        ids = torch.arange(30)[None]
        with torch.no_grad():
            assert torch.allclose(adapted(ids).logits, done.lm.model(ids).logits, atol=1e-4)


@pytest.mark.parametrize(("changes", "says"), [
    ({"retention": 0.1}, "cannot be held: use --retention 0"),
    ({"train": "osf"}, "orthogonal subspace"),
    ({"train": "mlp", "optimizer": "muon"}, "cannot be trained with Muon"),
])
def test_what_experts_cannot(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        inject(tiny_lm("mixtral"), [a_set()], FAST.but(**changes))


def test_stacked_weights_that_are_no_experts_are_refused() -> None:
    lm = tiny_lm("llama")
    config = CONFIG_MAPPING["recurrent_gemma"](
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, lru_width=32, attention_window_size=64, vocab_size=len(lm.tokenizer))
    lm.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(ModelError, match="neither a matrix nor known as experts"):
        inject(lm, [a_set()], FAST)


def test_bf16_that_is_only_emulated_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert not multiplies_bf16(torch.device("cuda")) and multiplies_bf16(torch.device("mps"))


def test_a_model_that_cannot_be_placed_or_written_is_one_line(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    lm.save(tmp_path / "model")
    with pytest.raises(ModelError, match=r"cannot put '.*' on the device 'cuda:99'"):
        LM.load(str(tmp_path / "model"), device="cuda:99")
    lm.model.generation_config.update(do_sample=False, temperature=0.7)
    with pytest.raises(OutputError, match="generation_config"):
        lm.save(tmp_path / "other")


def test_a_checkpoint_that_lacks_weights_is_one_line(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    lm.model.config.tie_word_embeddings = False
    lm.save(tmp_path / "whole")
    assert LM.load(str(tmp_path / "whole")).name
    lm.model.model.save_pretrained(tmp_path / "headless")
    lm.tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(ModelError, match=r"lacks 1 of its weights \('lm_head.weight' is one\)"):
        LM.load(str(tmp_path / "headless"))


def test_lora_targets_are_the_papers() -> None:
    assert lora_targets(tiny_lm("llama")) == sorted(["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"])
    assert not any("attn.c_proj" in name for name in lora_targets(tiny_lm("gpt2")))


def test_an_empty_context_gives_kl_zero() -> None:
    lm = tiny_lm("llama")
    empty = TargetSet(Context(""), a_set().related, a_set().unrelated)
    rows, prefixes = build_rows(lm, [empty], PAPER)
    states = teacher_states(lm, rows, prefixes)
    packed = pack(rows, range(len(rows)), offsets(rows), 1, 0)
    with torch.no_grad():
        h = lm.hidden(lm.model, input_ids=packed.ids, position_ids=packed.position_ids).flatten(0, 1)[packed.index]
    assert float(kl_tokens(h, head_of(lm), states[packed.source], head_of(lm)).max()) < 1e-6


def test_same_seed_same_weights() -> None:
    lm = tiny_lm("llama")
    recipe = FAST.but(lora_dropout=0.1, epochs=3)
    one, two = (inject(lm, [a_set()], recipe).lm.model.state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = inject(lm, [a_set()], recipe.but(seed=1)).lm.model.state_dict()
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_adapter_alone_gives_the_merged_weights() -> None:
    from peft import get_peft_model, set_peft_model_state_dict

    lm = tiny_lm("llama")
    done = inject(lm, [a_set()], FAST, keep_adapter=True)
    assert done.adapter is not None
    config, weights = done.adapter
    model = get_peft_model(copy.deepcopy(lm.model), config)
    set_peft_model_state_dict(model, weights)
    ids = torch.tensor([lm.encode("Who keeps the lamp?")])
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, done.lm.model(ids).logits, atol=1e-4)


def test_a_loss_that_is_not_finite_is_one_line() -> None:
    with pytest.raises(InjectionError, match="smaller learning rate"):
        inject(tiny_lm("llama"), [a_set()], FAST.but(lr=1e30, train="full", clip=1e30))


@pytest.mark.parametrize(("wrong", "message"), [
    ({"batch_tokens": 0}, "batch_tokens is 0: it must be at least 1"), ({"lora_rank": 0}, "lora_rank"),
    ({"held_out": 0.3, "patience": 0}, "patience"), ({"epochs": 0}, "epochs"), ({"epochs": 2.5}, "a whole number"),
    ({"lr": 0.0}, "lr is 0.0: it must be above 0"), ({"lr": float("nan")}, "lr is nan"), ({"lr": "1e-3"}, "a number"),
    ({"top_k": -1}, "top_k is -1: it must be at least 0"), ({"unrelated_share": 1.5}, "from 0 to 1"),
    ({"unrelated_weight": 0.0}, "above 0"),
    ({"train": "loora"}, "one of lora, mlp, full, osf"), ({"objective": "klx"}, "objective"),
    ({"precision": "float16"}, "precision"), ({"seed": True}, "seed"), ({"teacher_sees_x": 2}, "true or false"),
])
def test_a_recipe_that_cannot_be_meant_is_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InjectionError, match=message):
        FAST.but(**wrong)
    assert Recipe(lr=1, seed=-1, held_out=1.0).lr == 1


def test_a_gradient_that_is_not_finite_is_named() -> None:
    with pytest.raises(InjectionError, match="norm of the gradient became inf in epoch 3"):
        check_finite(0.5, float("inf"), 2, FAST)


def test_nothing_to_train_and_too_long() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(InjectionError, match="no sentences"):
        inject(lm, [TargetSet(Context("x"), ())], FAST)
    with pytest.raises(InjectionError, match="split the context"):
        inject(lm, [TargetSet(Context("word " * 5000), a_set().related)], FAST)
