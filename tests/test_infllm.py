"""InfLLM: against a float64 reference that knows every token, against full attention, and at the edges."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoConfig

from selfparam.errors import ModelError, TableError
from selfparam.lm import LM
from selfparam.methods import make_method
from selfparam.methods.blocks import Blocks, Settings, block_attention
from selfparam.methods.infllm import LLAMA_3_8B, MISTRAL_7B, VICUNA_7B, Streamed, extend, kv_bytes, logits
from selfparam.types import Context, Question, TargetSet
from tests.plain_llama import Plain, infllm
from tests.tiny import tiny_lm

SMALL = Settings(block=4, n_init=3, n_local=8, topk=2, repr_topk=2, exc_block=4, max_cached_block=3, chunk=12)
WORDS = ("the harbour of Tamberwick was built by Philla", "a lamp keeper writes into a blue book", "Orrin sells clocks")
SETS = [TargetSet(Context(text), ()) for text in WORDS]
WHO, WHAT = Question("Who built the harbour?", ("-",)), Question("What does Orrin sell?", ("-",))
ASKED = [WHO, WHAT, WHO]
OPTIONS = {"block": 4, "n_init": 4, "n_local": 16, "topk": 2, "repr_topk": 2, "exc_block": 8, "max_cached_block": 4,
           "chunk": 16}


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def row(n: int, seed: int = 0) -> list[int]:
    return torch.randint(5, 250, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def full(lm: LM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids])).logits[0]


# --- the same as ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    SMALL,
    dataclasses.replace(SMALL, exc_block=3, chunk=7, block=5, n_init=0),  # execution blocks of 3, 3, 1
    dataclasses.replace(SMALL, topk=0, repr_topk=1),
    dataclasses.replace(SMALL, exc_block=8, n_init=13, block=2),
], ids=["plain", "odd", "no blocks", "many initial"])
def test_logits_are_those_of_the_reference(lm: LM, settings: Settings) -> None:
    ids = row(42)
    want, _ = infllm(Plain(lm.model), ids, settings)
    assert torch.allclose(logits(lm, ids, settings).double(), want, atol=5e-5)


def test_the_reference_looks_at_blocks_that_were_chosen(lm: LM) -> None:
    """The comparison above depends on the choice: there are more blocks than may be looked at, and it changes."""
    _, looked = infllm(Plain(lm.model), row(42), SMALL)
    assert max(max(one, default=0) for one in looked) >= SMALL.n_init + 3 * SMALL.block
    assert len({tuple(one) for one in looked if len(one) == SMALL.topk}) > 2
    assert not torch.allclose(logits(lm, row(42), SMALL)[-1],
                              logits(lm, row(42), dataclasses.replace(SMALL, topk=9))[-1], atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_window_larger_than_the_input_is_full_attention(kind: str) -> None:
    lm, ids = tiny_lm(kind), row(60)
    found = logits(lm, ids, dataclasses.replace(SMALL, n_local=64, exc_block=16))
    lm.model.config.sliding_window = None  # InfLLM takes no notice of it
    assert torch.allclose(found, full(lm, ids), atol=2e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 25])
def test_the_first_window_equals_full_attention_at_every_length(lm: LM, n: int) -> None:
    found = logits(lm, row(n), SMALL)
    assert found.shape == (n, lm.text_config.vocab_size)
    assert torch.allclose(found[: SMALL.n_local], full(lm, row(n))[: SMALL.n_local], atol=2e-5)


def test_neither_chunks_nor_the_cache_of_blocks_change_results(lm: LM) -> None:
    want = logits(lm, row(90), SMALL)
    for change in ({"chunk": 4}, {"chunk": 400}, {"max_cached_block": 0}, {"max_cached_block": 1}):
        assert torch.allclose(logits(lm, row(90), dataclasses.replace(SMALL, **change)), want, atol=2e-5), change


def test_bfloat16_is_near_float32(lm: LM) -> None:
    half = tiny_lm()
    half.model.to(torch.bfloat16)
    assert (logits(half, row(40), SMALL).float() - logits(lm, row(40), SMALL)).abs().mean() < 0.1


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_every_token_is_kept_once_and_what_is_near_stays_small(lm: LM) -> None:
    s, near = SMALL, []
    blocks = Blocks(lm.model, s)
    with torch.no_grad(), block_attention(lm.model):
        for at in range(0, 240, 12):
            extend(lm, blocks, row(12, at), s.chunk)
            for layer in blocks.layers:
                held = layer.initial[0].shape[1] + len(layer.blocks) * s.block + layer.keys.shape[1]
                assert held == layer.seen == at + 12
                assert layer.keys.shape[1] < s.n_local + s.block and len(layer.cached) <= s.max_cached_block
                assert layer.representatives.shape[0] == len(layer.blocks)
            near.append(blocks.nbytes()[0] - sum(b.representatives.nbytes for b in blocks.layers))
    assert max(near[5:]) == near[5] and blocks.nbytes()[1] > 5 * max(near)


def test_the_model_is_left_as_it_was(lm: LM) -> None:
    before = lm.model.config._attn_implementation
    logits(lm, row(20), SMALL)
    assert lm.model.config._attn_implementation == before != "selfparam_blocks"


def test_settings_of_the_paper() -> None:
    assert MISTRAL_7B == LLAMA_3_8B == Settings(128, 128, 4096, 16, 4, 512, 32, 8192)
    assert Settings(n_local=2048) == VICUNA_7B
    llama = AutoConfig.for_model("llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                                 num_key_value_heads=8)
    assert kv_bytes(llama, 2) == 128 * 1024
    assert round(250_000 * kv_bytes(llama, 2) / 1e9) == 33  # 32 GB, in units of 1.024e9


@pytest.mark.parametrize(("change", "says"), [({"exc_block": 9}, "more than n_local"), ({"repr_topk": 5}, "repr_topk"),
                                              ({"block": 0}, "block = 0"), ({"n_init": -1}, "n_init = -1")])
def test_settings_that_contradict_each_other(change: dict[str, int], says: str) -> None:
    with pytest.raises(TableError, match=says):
        dataclasses.replace(SMALL, **change)


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("one_shot", [False, True])
def test_answers_in_a_large_window_are_those_of_all_contexts_in_the_prompt(chat: bool, one_shot: bool) -> None:
    lm = tiny_lm(chat=chat)
    wide = OPTIONS | {"n_local": 512, "exc_block": 64, "one_shot": one_shot}
    reader = make_method("infllm", wide).absorb(lm, SETS)
    everything = make_method("base", {"context": "all"}).absorb(lm, SETS)
    assert reader.answer(ASKED) == everything.answer(ASKED)
    assert isinstance(reader, Streamed) and reader.storage_tokens == len(lm.prefix(", ".join(WORDS))) - len(lm.encode(
        "\n\n"))


@pytest.mark.parametrize("one_shot", [False, True])
def test_questions_do_not_see_each_other_and_sequences_are_folds(lm: LM, one_shot: bool) -> None:
    method = make_method("infllm", OPTIONS | {"one_shot": one_shot})
    reader = method.absorb(lm, SETS)
    answers = reader.answer(ASKED)
    assert answers == [reader.answer([one])[0] for one in reversed(ASKED)][::-1] and answers[0] == answers[2]
    one = method.absorb(lm, SETS[:1])
    alone = one.answer(ASKED)
    more = method.absorb(lm, SETS[1:], after=one)
    assert isinstance(more, Streamed) and isinstance(reader, Streamed) and more.ids == reader.ids
    assert one.answer(ASKED) == alone
    if one_shot:
        assert more.answer(ASKED) == answers


def test_one_shot_and_shared_differ_in_borders_only(lm: LM) -> None:
    """Where the question starts at a border of execution blocks, both are the same."""
    s, ids, question = SMALL, row(36), row(9, 1)
    blocks = Blocks(lm.model, s)
    with torch.no_grad(), block_attention(lm.model):
        extend(lm, blocks, ids, s.chunk)
        states = extend(lm, blocks.snapshot(), question[:-1], s.chunk)
    found = lm.model.get_output_embeddings()(states)
    assert torch.allclose(found, logits(lm, ids + question, s)[36:-1], atol=2e-5)


def test_no_context_an_empty_one_and_a_question_longer_than_the_window(lm: LM) -> None:
    method = make_method("infllm", OPTIONS)
    plain = make_method("base", {}).absorb(lm, [])
    short = [Question("Who?", ("-",))]
    for sets in ([], [TargetSet(Context(""), ())]):
        reader = make_method("infllm", OPTIONS | {"n_local": 512}).absorb(lm, sets)
        assert reader.answer(short) == plain.answer(short) and reader.storage_tokens == 1
    long = Question("Who built the harbour of Tamberwick? " * 20, ("-",))
    assert len(lm.question(long.text)) > 4 * OPTIONS["n_local"]
    assert len(method.absorb(lm, SETS).answer([long])) == 1
    with pytest.raises(ModelError, match="no tokens"):
        logits(lm, [], SMALL)


def test_models_that_cannot_be_read_this_way() -> None:
    with pytest.raises(ModelError, match="'tiny-gpt2' is of the type 'gpt2'"):
        make_method("infllm", OPTIONS).absorb(tiny_lm("gpt2"), SETS)
    with pytest.raises(ModelError, match="larger than the window of 1024"):
        make_method("infllm", {}).absorb(tiny_lm(), SETS)
    lm = tiny_lm()
    lm.model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match="RoPE of the type 'yarn'"):
        logits(lm, row(5), SMALL)
