"""MemoryLLM: against a float64 reference, the update rule and its law, the layout of checkpoints, the edges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from selfparam.errors import ModelError
from selfparam.lm import LM
from selfparam.methods import make_method
from selfparam.methods.memoryllm import MemoryLLM, Remembering, cut, load_memoryllm, with_adapters
from selfparam.methods.pool import READING, WRITING, MemoryModel, inject_memory, logits, untrained, updated, written
from selfparam.types import Context, Question, TargetSet
from tests.plain_llama import Plain, memory_read, memory_write
from tests.tiny import tiny_lm, tiny_tokenizer

K, BLOCKS = 20, 3
WORDS = ("the harbour of Tamberwick was built by Philla Grunstone", "a lamp keeper writes the weather into a blue book",
         "Orrin sells clocks and clocks and more clocks every day")
SETS = [TargetSet(Context(text), ()) for text in WORDS]
WHO, WHAT = Question("Who built the harbour?", ("-",)), Question("What does Orrin sell?", ("-",))
OPTIONS = {"blocks": 4, "tokens": 8, "longest": 64}
#: Llama-3-8B's keys, tiny. The rest is what the published configuration says.
CONFIG = {
    "model_type": "memoryllm", "architectures": ["MemoryLLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 1.8125},
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "num_blocks": BLOCKS, "num_tokens": K,
    "add_bos_embedding": True, "drop_memory_per_layer": True, "add_decoder_lora": True,
    "lora_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "inference_mode": False},
}
LAYER = {f"self_attn.{x}_proj" for x in "qkv"} | {f"mlp.{x}_proj" for x in ("up", "down", "gate")}


def row(n: int, seed: int = 0) -> list[int]:
    return torch.randint(5, 250, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def published(initialized: int = 1) -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of a published checkpoint."""
    vocabulary, d, mlp = len(tiny_tokenizer()), CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "memory": (2, BLOCKS * K, d), "bos_embedding": (2, 1, d), "new_memory_positional_emb": (1, 1, d),
        "lm_head.weight": (vocabulary, d), "model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,),
    }
    sides = {"k_proj": (16, d), "v_proj": (16, d), "up_proj": (mlp, d), "gate_proj": (mlp, d), "down_proj": (d, mlp)}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": (d,), f"{at}post_attention_layernorm.weight": (d,),
                   f"{at}self_attn.o_proj.weight": (d, d)}
        for name in LAYER:
            out, into = sides.get(name.split(".")[1], (d, d))
            shapes[f"{at}{name}.base_layer.weight"] = (out, into)
            for adapter in (WRITING, READING):
                shapes |= {f"{at}{name}.lora_A.{adapter}.weight": (4, into),
                           f"{at}{name}.lora_B.{adapter}.weight": (out, 4)}
    found = {k: 0.2 * randn(*shape, seed=i) for i, (k, shape) in enumerate(sorted(shapes.items()))}
    return found | {"initialized": torch.tensor(initialized, dtype=torch.uint8)}


def save(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> str:
    """In two shards, as large checkpoints come."""
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tiny_tokenizer())}))
    names = sorted(state)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: state[name] for name in part}, folder / f"model-0000{i}-of-00002.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("memoryllm"), published(), CONFIG)


# --- the same as the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [16, 19, 20, 21, 45])
def test_writing_and_reading_are_those_of_the_reference(lm: LM, n: int) -> None:
    """Fewer tokens than K, as many, more; with a position embedding that is not zero."""
    made = untrained(lm, BLOCKS, K)
    model = MemoryModel(lm, made.start, 0.3 * randn(1, 1, 32), BLOCKS, K, trained=False)
    plain, memory = Plain(lm.model), randn(2, BLOCKS * K, 32)
    want = memory_write(plain, model.start, model.position, memory, K, row(n))
    assert torch.allclose(written(model, memory, row(n)).double(), want, atol=1e-5)
    first = memory_write(plain, model.start, model.position, None, K, row(n))
    assert first.shape[1] == min(n, K)
    assert torch.allclose(written(model, None, row(n)).double(), first, atol=1e-5)
    found = logits(model, memory, row(n, 1))
    assert torch.allclose(found.double(), memory_read(plain, model.start, memory, row(n, 1)), atol=1e-5)


@pytest.mark.parametrize("n", [17, 33])
def test_a_checkpoint_writes_with_one_adapter_and_reads_with_the_other(checkpoint: str, n: int) -> None:
    model, memory = load_memoryllm(checkpoint)
    state = published()
    assert memory is not None and torch.equal(memory, state["memory"]) and model.trained and model.size == BLOCKS * K
    assert model.lm.text_config.rope_parameters["rope_type"] == "linear"

    def plain(adapter: str) -> Plain:
        names = [f"model.layers.{i}.{name}" for i in range(2) for name in LAYER]
        return Plain(model.lm.model, {x: 2 * state[f"{x}.lora_B.{adapter}.weight"]
                                      @ state[f"{x}.lora_A.{adapter}.weight"] for x in names})

    kept = torch.stack([torch.arange(K, BLOCKS * K), torch.arange(0, (BLOCKS - 1) * K)])
    for _ in range(2):  # writing and reading by turns
        delta = memory_write(plain(WRITING), model.start, model.position, memory, K, row(n))
        new = inject_memory(model, memory, row(n), kept)
        want = torch.cat([torch.stack([memory[0, K:], memory[1, :-K]]).double(), delta], dim=1)
        assert torch.allclose(new.double(), want, atol=1e-5)
        read = memory_read(plain(READING), model.start, new, row(9))
        assert torch.allclose(logits(model, new, row(9)).double(), read, atol=1e-5)


def test_an_empty_pool_is_the_plain_model(lm: LM) -> None:
    model = untrained(lm, BLOCKS, K)
    with torch.no_grad():
        want = lm.model(input_ids=torch.tensor([row(9)])).logits[0]
    assert torch.equal(logits(model, None, row(9)), want)


# --- the update rule --------------------------------------------------------------------------------------------------


def test_the_first_text_fills_the_pool_with_copies() -> None:
    new = torch.arange(16.0).view(1, 16, 1)
    filled = updated(None, new, 60, torch.Generator())
    assert filled.flatten().tolist() == [*range(16)] * 3 + [*range(4, 16)]
    assert updated(None, new, 48, torch.Generator()).shape == (1, 48, 1)


def test_each_layer_drops_its_own_tokens_and_keeps_the_order() -> None:
    memory = torch.arange(60.0).expand(3, 60)[..., None]
    new = torch.full((3, K, 1), -1.0)
    found = updated(memory, new, 60, torch.Generator().manual_seed(3))[..., 0]
    assert found.shape == (3, 60) and (found[:, -K:] == -1).all()
    assert (found[:, 1 : 60 - K] > found[:, : 60 - K - 1]).all()
    assert len({tuple(layer.tolist()) for layer in found}) == 3
    again = updated(memory, new, 60, torch.Generator().manual_seed(3))[..., 0]
    assert torch.equal(found, again)
    generator = torch.Generator().manual_seed(3)
    kept = torch.stack([torch.randperm(60, generator=generator)[: 60 - K].sort().values for _ in range(3)])
    assert torch.equal(updated(memory, new, 60, kept)[..., 0], found)


def test_a_thousand_injections_keep_the_size_and_the_survival_law() -> None:
    """A token survives m later injections with probability ((N - K) / N)^m; a thousand injections, many tokens."""
    tokens, blocks, layers = 4, 25, 60
    size, law = tokens * blocks, (blocks - 1) / blocks
    generator = torch.Generator().manual_seed(0)
    memory = torch.zeros(layers, size, 1)
    ages: dict[int, list[float]] = {m: [] for m in (1, 10, 40)}
    for step in range(1, 1001):
        memory = updated(memory, torch.full((layers, tokens, 1), float(step)), size, generator)
        assert memory.shape == (layers, size, 1)
        for m in ages:
            if step > 100 and step % 50 == 0:
                ages[m].append(float((memory == step - m).float().sum()) / (layers * tokens))
    for m, found in ages.items():
        rate, n = sum(found) / len(found), len(found) * layers * tokens
        assert abs(rate - law**m) < 4 * (law**m * (1 - law**m) / n) ** 0.5, m


def test_the_pool_of_a_model_keeps_its_size_and_stays_finite(lm: LM) -> None:
    model, memory = untrained(lm, 4, 8), None
    generator = torch.Generator().manual_seed(0)
    for i in range(100):
        memory = inject_memory(model, memory, row(16, i % 7), generator)
    assert memory is not None and memory.shape == (2, 32, 32) and bool(memory.isfinite().all())
    assert logits(model, memory, row(5)).isfinite().all()


def test_numbers_of_the_published_model() -> None:
    """50 blocks of 256 tokens in 32 layers of 4,096 numbers: 1.678 B; 2 % go with each text, 13 % outlast 100."""
    shape = MemoryLLM()
    model = MemoryModel(tiny_lm(), torch.zeros(32, 1, 4096), torch.zeros(1, 1, 4096), shape.blocks, shape.tokens, True)
    assert model.size == 12_800
    assert round(model.start.shape[0] * model.size * model.start.shape[2] / 1e9, 3) == 1.678
    law = 1 - model.tokens / model.size
    assert law == 0.98 and round(law**100, 2) == 0.13


# --- texts and questions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "sizes"), [
    (16, [16]), (63, [63]), (64, [64]), (65, [16, 49]), (79, [16, 63]), (80, [16, 64]), (128, [64, 64]),
    (130, [16, 50, 64]), (200, [16, 56, 64, 64]), (150, [22, 64, 64]),
])
def test_long_texts_are_cut_from_the_end(n: int, sizes: list[int]) -> None:
    pieces = cut(list(range(n)), 64)
    assert [len(piece) for piece in pieces] == sizes
    assert [i for piece in pieces for i in piece] == list(range(n))


def test_questions_do_not_see_each_other_and_sequences_are_folds(lm: LM) -> None:
    method = make_method("memoryllm", OPTIONS)
    reader = method.absorb(lm, SETS)
    answers = reader.answer([WHO, WHAT, WHO])
    assert answers == [reader.answer([q])[0] for q in (WHO, WHAT, WHO)]
    assert isinstance(reader, Remembering) and reader.memory is not None
    one = method.absorb(lm, SETS[:1])
    before = one.memory.clone()
    more = method.absorb(lm, SETS[1:], after=one)
    assert torch.equal(one.memory, before) and (more.pieces, one.pieces) == (3, 1)
    assert one.storage_tokens == more.storage_tokens == reader.storage_tokens == 32
    assert torch.equal(method.absorb(lm, SETS[:1], seed=1).memory, before)  # the first text only fills
    assert torch.equal(method.absorb(lm, SETS).memory, reader.memory)
    assert not torch.equal(method.absorb(lm, SETS, seed=1).memory, reader.memory)


def test_notes_say_that_a_memory_is_untrained_and_what_was_not_written(lm: LM, checkpoint: str) -> None:
    method = make_method("memoryllm", OPTIONS)
    short = [TargetSet(Context("hi"), ()), TargetSet(Context(""), ())]
    reader = method.absorb(lm, [*short, *SETS])
    assert reader.notes == [
        "untrained memory (32 memory tokens in each of 2 layers): not what a trained MemoryLLM reaches",
        "2 contexts have fewer than 16 tokens and were not written",
    ]
    trained = make_method("memoryllm", {"checkpoint": checkpoint}).absorb(lm, SETS)
    assert trained.notes == ["60 memory tokens in each of 2 layers"] and trained.lm is not lm
    assert len(trained.answer([WHO])) == 1
    nothing = method.absorb(lm, short)
    assert nothing.answer([WHO, WHAT]) == make_method("base", {}).absorb(lm, []).answer([WHO, WHAT])


def test_the_model_of_the_table_is_left_as_it_was(lm: LM) -> None:
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    make_method("memoryllm", OPTIONS).absorb(lm, SETS).answer([WHO])
    after = lm.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit(lm: LM) -> None:
    with pytest.raises(ModelError, match="12800 memory tokens"):
        make_method("memoryllm", {}).absorb(lm, SETS)
    with pytest.raises(ModelError, match="is empty"):
        make_method("memoryllm", OPTIONS | {"blocks": 0}).absorb(lm, SETS)
    with pytest.raises(ModelError, match="use longer pieces"):
        make_method("memoryllm", OPTIONS | {"longest": 31}).absorb(lm, SETS)
    with pytest.raises(ModelError, match="at least 16 tokens, not 15"):
        inject_memory(untrained(lm, 2, 4), None, row(15), torch.Generator())
    reader = make_method("memoryllm", OPTIONS).absorb(lm, SETS)
    with pytest.raises(ModelError, match="does not fit the window of 1024"):
        reader.answer([Question("Who built it? " * 300, ("-",))])
    with pytest.raises(ModelError, match="'tiny-qwen2' is of the type 'qwen2'"):
        make_method("memoryllm", OPTIONS).absorb(tiny_lm("qwen2"), SETS)
    with pytest.raises(ModelError, match="sliding window"):
        make_method("memoryllm", OPTIONS).absorb(tiny_lm("mistral"), SETS)


def test_a_pool_that_says_it_is_empty(tmp_path: Path) -> None:
    assert load_memoryllm(save(tmp_path, published(initialized=0), CONFIG))[1] is None


@pytest.mark.parametrize(("wrong", "says"), [
    ("no folder", "cannot load the MemoryLLM checkpoint"), ("no memory", "lacks memory"),
    ("one drop for all", "lacks drop_memory_per_layer"), ("no norm", "disagree about model.norm.weight"),
    ("other pool", "disagree about memory"), ("more", "disagree about model.extra"),
])
def test_checkpoints_of_another_layout(tmp_path: Path, wrong: str, says: str) -> None:
    state, config = published(), dict(CONFIG)
    if wrong == "no memory":
        del state["memory"]
    if wrong == "one drop for all":
        config["drop_memory_per_layer"] = False
    if wrong == "no norm":
        del state["model.norm.weight"]
    if wrong == "other pool":
        config["num_blocks"] = BLOCKS + 1
    if wrong == "more":
        state["model.extra"] = torch.zeros(1)
    folder = save(tmp_path, state, config) if wrong != "no folder" else str(tmp_path / "none")
    with pytest.raises(ModelError, match=says):
        load_memoryllm(folder)


def test_weights_of_the_published_model_have_the_published_names() -> None:
    names = set(with_adapters(CONFIG | {"vocab_size": len(tiny_tokenizer())}).state_dict())
    own = {"memory", "bos_embedding", "new_memory_positional_emb", "initialized"}
    assert names == set(published()) - own
