"""Self-rehearsal: what is written from memory, what is dropped, and that nothing is kept; sequences around it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selfparam.data.benchmarks import BENCHMARKS
from selfparam.errors import InjectionError, ModelError
from selfparam.inject import inject
from selfparam.inject.memory import Kept
from selfparam.inject.pairs import Row, build_rows, epoch_steps
from selfparam.inject.teacher import teacher_states, teacher_targets
from selfparam.lm import LM
from selfparam.methods import make_method, selfparam
from selfparam.metrics.forgetting import backward_transfer, forgetting
from selfparam.targets import rehearsal
from selfparam.targets.rehearsal import (
    Rehearsal,
    _scores,
    add_rehearsed,
    rehearse,
    without_contradicted,
)
from selfparam.types import PAPER, PAPER_SEQUENTIAL, SMALL, SMALL_REHEARSAL, Context, Sentence, TargetSet
from tests.tiny import tiny_lm

X = Context("The harbour of Tamberwick was built in 1904 by Philla Grunstone.")
SET = TargetSet(X, (Sentence("Who built the harbour of Tamberwick?", "Philla Grunstone", X.id),
                    Sentence("When was the harbour built?", "1904", X.id)))
QUICK = {"from": "small", "epochs": 1, "precision": "fp32"}


def scripted(monkeypatch: pytest.MonkeyPatch, lm: LM, texts: Sequence[str], answers: dict[str, str],
             read: str = "") -> list[tuple[list[str], Any]]:
    """lm writes `texts` in turn and answers by the first word of `answers` in a question; reading x, it answers `read`.

    Returns the prompts that it was given, as texts, and the model that it was guided by.
    """
    left, prompts = iter(texts), []

    def generate(rows: Sequence[Sequence[int]], **options: Any) -> list[str]:
        prompts.append(([lm.tokenizer.decode(row) for row in rows], options["against"]))
        return [next(left, "no more") for _ in rows]

    def answer(questions: Sequence[str], contexts: Sequence[str] | None = None, **options: Any) -> list[str]:
        if contexts:
            return [read] * len(questions)
        return [next((a for word, a in answers.items() if word in q), "yes") for q in questions]

    monkeypatch.setattr(lm, "generate", generate)
    monkeypatch.setattr(lm, "answer", answer)
    return prompts


def test_what_cannot_be_used_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(chat=True)
    endless = " and so on" * 60
    texts = ["Who keeps the lamp", "Who keeps the lamp?", "What ever", f"Who was {endless}", "Who sails the boat",
             "Tell me who kept it.\nMore"]
    prompts = scripted(monkeypatch, lm, texts, {"lamp": "Mara", "sails": endless})
    found = rehearse(lm, 4)  # asks for a half more than it needs
    assert found.sentences == (Sentence("Who keeps the lamp?", "Mara"), Sentence("Tell me who kept it.", "yes"))
    assert found.dropped == {"repeated": 1, "no question": 1, "unfinished": 2}
    assert prompts == [(["<|begin|><|user|>"] * 6, None)]


def test_most_was_learned_and_the_others_begin_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, first = tiny_lm(chat=True), tiny_lm(chat=True)
    monkeypatch.setattr(rehearsal, "AT_ONCE", 4)  # one of four is enough for another round
    texts = ["Who was it number 0", "Who was it number 2", "Who was it number 2?", "Who was it number 7",
             " was it number 2", " was it number 1", " was it number 0", " ever"]
    prompts = scripted(monkeypatch, lm, texts, {"0": "no", "2": "two"})
    others = scripted(monkeypatch, first, [" was it number 2", "ever saw number 8", " was it number 0", " was it at 9"],
                      {"0": "never", "2": "none"})
    scores = {"two": (-1.0, 3.0), "no": (-1.0, 1.0), "yes": (-9.0, 9.0)}  # learned; known before; a guess
    monkeypatch.setattr(rehearsal, "_scores", lambda *given: [scores[s.completion] for s in given[2]])
    found = rehearse(lm, 4, first=first)
    assert found.sentences == (Sentence("Who was it number 2?", "two", rehearsed=True),
                               Sentence("Who was it number 0?", "never"), Sentence("Who was it at 9?", "yes"))
    assert found.dropped == {"repeated": 3, "not learned": 3, "no question": 2}
    # the second round began with what the first one left, and brought nothing new
    assert prompts == [(["<|begin|><|user|>"] * 4, first), (["<|begin|><|user|>Who"] * 4, first)]
    assert others == [(["<|begin|><|user|>Who"] * 4, None)]  # the first θ writes what it also teaches


def test_it_asks_on_while_that_brings_something_new_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, first = tiny_lm(chat=True), tiny_lm(chat=True)
    monkeypatch.setattr(rehearsal, "AT_ONCE", 4)
    monkeypatch.setattr(rehearsal, "_scores", lambda *given: [(0.0, 9.0)] * len(given[2]))
    texts = [f"{'Who' if i in (*range(4), *range(8, 12)) else ''} was it that met N{i}" for i in range(40)]
    prompts = scripted(monkeypatch, lm, texts, {})
    scripted(monkeypatch, first, [], {})
    found = rehearse(lm, 10, first=first)  # eight of them are learned ones
    assert len(prompts) == 2 and sum(s.rehearsed for s in found.sentences) == 8
    assert len(rehearse(lm, 20, first=first).sentences) == 16 and len(prompts) == 6


def test_a_first_round_without_a_question_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, first = tiny_lm(chat=True), tiny_lm(chat=True)
    monkeypatch.setattr(rehearsal, "AT_ONCE", 4)
    monkeypatch.setattr(rehearsal, "_scores", lambda *given: [(0.0, 9.0)] * len(given[2]))
    prompts = scripted(monkeypatch, lm, ["Once"] * 4 + [f"Who was it that met N{i}" for i in range(4)], {})
    scripted(monkeypatch, first, [], {})
    assert len(rehearse(lm, 5, first=first).sentences) == 4 and len(prompts) == 2


def test_no_fact_crowds_out_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, first = tiny_lm(chat=True), tiny_lm(chat=True)
    monkeypatch.setattr(rehearsal, "_scores", lambda *given: [(0.0, 9.0)] * len(given[2]))
    texts = [f"{'Tell me: Who' if i % 2 else 'Who'} {i} built Ardeara" for i in range(9)]
    texts += ["When was Ardeara built", "Who built Varo"]
    scripted(monkeypatch, lm, texts, {"When": "1904"})
    scripted(monkeypatch, first, [], {})
    found = rehearse(lm, 400, first=first)
    assert len([s for s in found.sentences if "built Ardeara" in s.prompt and s.completion == "yes"]) == rehearsal.OFTEN
    assert [s.prompt for s in found.sentences[-2:]] == ["When was Ardeara built?", "Who built Varo?"]
    assert found.dropped["not needed"] == 9 - rehearsal.OFTEN


def test_learned_is_the_answer_that_the_first_model_would_not_give() -> None:
    lm, first = tiny_lm(chat=True, seed=1), tiny_lm(chat=True)
    written = [Sentence("Who keeps the red lamp?", "Mara"), Sentence("Who sails?", "Tom"),
               Sentence("When was it that the harbour was built by Tom?", "in 1904, as far as we know")]
    for sentence, (sure, gain) in zip(written, _scores(lm, first, written), strict=True):
        head, (ids, prompt) = lm.prefix(None), lm.sentence(sentence)
        by_hand = []
        for model in (lm.model, first.model):
            with torch.no_grad():
                log_p = model(torch.tensor([[*head, *ids]])).logits[0].double().log_softmax(-1)
            by_hand.append(sum(float(log_p[len(head) + k - 1, ids[k]]) for k in range(prompt, len(ids))))
        assert sure == pytest.approx(by_hand[0], abs=1e-3)
        assert gain == pytest.approx(by_hand[0] - by_hand[1], abs=1e-3)  # rows of other lengths change nothing


def test_guided_by_itself_a_model_writes_what_it_would_write_anyway() -> None:
    lm, other = tiny_lm(chat=True), tiny_lm(chat=True, seed=1)
    rows = [[*lm.prefix(None), *lm.encode(text)] for text in ("Who keeps the lamp", "When")]
    plain, same, away = (lm.generate(rows, max_new_tokens=6, against=one) for one in (None, lm, other))
    assert plain == same != away


def test_no_context_is_shown_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for chat, begins in ((True, "<|begin|><|user|>"), (False, "<|begin|>Question:")):
        lm = tiny_lm(chat=chat)
        prompts = scripted(monkeypatch, lm, [f"Who was it number {i}" for i in range(6)], {})
        sets, found = add_rehearsed(lm, [SET], 4)
        assert len(found.sentences) == 4 and found.dropped == {"not needed": 2}
        assert prompts == [([begins] * 6, None)]
        assert sets[0].unrelated == found.sentences and sets[0].related == SET.related
        assert all(s.about is None for s in found.sentences)


def test_what_the_new_context_contradicts_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(chat=True)
    old = Sentence("Who built the harbour of Tamberwick?", "Odric Hallan")
    same = Sentence("Who was it that built Tamberwick?", "Philla Grunstone")
    other = Sentence("Who keeps the lamp of Velmora?", "Odric Hallan")
    scripted(monkeypatch, lm, [], {}, read="philla grunstone.")
    found = without_contradicted(lm, Rehearsal((old, same, other), {"repeated": 1}), [SET])
    assert found == Rehearsal((same, other), {"repeated": 1, "contradicted": 1})


@pytest.mark.parametrize("chat", [False, True])
def test_a_real_model_repeats_with_the_seed(chat: bool) -> None:
    lm, first = tiny_lm(chat=chat), tiny_lm(chat=chat, seed=1)
    one = rehearse(lm, 8, first=first, seed=1)
    assert one == rehearse(lm, 8, first=first, seed=1)
    assert all(s.prompt and s.completion for s in one.sentences)
    assert len(one.sentences) + sum(one.dropped.values()) >= 8


def test_recipes() -> None:
    assert PAPER_SEQUENTIAL.rehearsal == 0 and SMALL.rehearsal == 0 < SMALL_REHEARSAL.rehearsal


def test_an_epoch_draws_its_share_of_the_unrelated_rows_and_all_others() -> None:
    rows = [Row((1,) * (4 + i % 3), 1, 0, (1,), 1.0, related=i % 4 == 0) for i in range(40)]
    rng = random.Random(0)
    epochs = [epoch_steps(rows, PAPER.but(batch_tokens=40, unrelated_share=0.5), rng) for _ in range(6)]
    for steps in epochs:
        chosen = [i for step in steps for i in step]
        assert len(set(chosen)) == len(chosen) == 10 + 15
        assert {i for i in chosen if rows[i].related} == set(range(0, 40, 4))
    assert {len(steps) for steps in epochs} == {3}  # half of 150 tokens and 50: always as many
    assert {i for steps in epochs for step in steps for i in step} == set(range(40))
    assert epoch_steps(rows[1:2], PAPER.but(unrelated_share=0.5), rng) == [[0]]  # never none, where there are some


def test_a_fold_rehearses_from_the_second_step_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    seen: list[tuple[Any, int]] = []

    def added(model: LM, sets: Sequence[TargetSet], n: int, **options: Any) -> Any:
        seen.append((model, n))
        return [TargetSet(one.context, one.related, (Sentence("Who?", "I"),)) for one in sets], Rehearsal(())

    monkeypatch.setattr(selfparam, "add_rehearsed", added)
    method = make_method("selfparam", {"recipe": QUICK | {"rehearsal": 2}, "ratio": 0.0})
    one = method.absorb(lm, [SET])
    assert not seen
    two = method.absorb(lm, [SET], after=one)
    assert seen == [(one.lm, 2)] and two.storage_tokens == 0  # the writer is the θ of the step before
    by_hand = inject(one.lm, added(one.lm, [SET], 2)[0], SMALL.but(epochs=1, precision="fp32", rehearsal=2)).lm
    assert all(torch.equal(a, b) for a, b in zip(two.lm.model.parameters(), by_hand.model.parameters(), strict=True))


def test_what_is_rehearsed_is_taught_by_the_model_itself() -> None:
    lm, first = tiny_lm(), tiny_lm()
    with torch.no_grad():
        first.model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    plain = Sentence("Who keeps the red lamp?", "Mara")
    own = replace(plain, rehearsed=True)
    rows, prefixes = build_rows(lm, [replace(SET, unrelated=(plain, own))], SMALL)
    with Kept(lm.device) as kept:
        mixed = teacher_targets(first, rows, prefixes, kept, own=lm)["states"]
    of_first, of_lm, n = teacher_states(first, rows, prefixes), teacher_states(lm, rows, prefixes), rows[-1].scored
    assert torch.equal(mixed[:-n], of_first[:-n]) and torch.equal(mixed[-n:], of_lm[-n:])
    assert not torch.allclose(of_first[-n:], of_lm[-n:])

    still = SMALL.but(epochs=1, lr=1e-9, precision="fp32")
    held, moved = (inject(lm, [TargetSet(SET.context, (), (one,))], still, teacher=first).trained.losses[0]
                   for one in (own, plain))
    assert held < 1e-6 < 1e-3 < moved
    with pytest.raises(InjectionError, match="output head"):
        inject(lm, [TargetSet(SET.context, (), (own,))], still, teacher=tiny_lm(seed=1))


def test_kept_pairs_are_trained_again_and_counted() -> None:
    lm = tiny_lm()
    method = make_method("selfparam", {"recipe": QUICK, "ratio": 0.0, "keep": "pairs"})
    other = TargetSet(Context("The lamp is red."), (Sentence("Which colour has the lamp?", "red", "lamp"),))
    one = method.absorb(lm, [SET])
    two = method.absorb(lm, [other], after=one)
    size = [sum(len(lm.encode(f"{s.prompt} {s.completion}")) for s in x.related) for x in (SET, other)]
    assert (one.storage_tokens, two.storage_tokens) == (size[0], sum(size))
    earlier = tuple(Sentence(s.prompt, s.completion) for s in SET.related)
    by_hand = inject(one.lm, [TargetSet(other.context, other.related, earlier)], SMALL.but(epochs=1, precision="fp32"))
    assert all(torch.equal(a, b) for a, b in zip(two.lm.model.parameters(), by_hand.lm.model.parameters(), strict=True))
    assert method.absorb(lm, [TargetSet(X, ())], after=two).storage_tokens == two.storage_tokens


# --- measures and data ------------------------------------------------------------------------------------------------


def test_forgetting_and_backward_transfer_as_they_were_defined() -> None:
    matrix = np.random.default_rng(0).random((4, 4))  # R[k][j]: context j after step k
    learned, end = list(np.diag(matrix)), list(matrix[-1])
    bwt = sum(matrix[3, j] - matrix[j, j] for j in range(3)) / 3
    forgot = sum(max(matrix[k, j] for k in range(3)) - matrix[3, j] for j in range(3)) / 3
    assert backward_transfer(learned, end) == pytest.approx(bwt)
    assert forgetting([list(row) for row in matrix[:3]], learned, end) == pytest.approx(forgot)
    assert forgetting([], [0.9, 0.8, 0.7, 0.6], [0.4, 0.8, 0.7, 0.6], newest=2) == pytest.approx(0.25)  # days of two
    assert backward_transfer([1.0], [1.0]) is None and forgetting([], [1.0], [1.0]) is None


def test_subjects_come_back_with_a_changed_or_with_further_facts() -> None:
    found = BENCHMARKS["revisits"](6, 2, len, apart=2, facts=3, changed=True)
    assert len(found.items) == 6 and len(found.fresh) == 2
    for first, second in zip(found.items[:2], found.items[2:4], strict=True):
        assert first.context.title == second.context.title and first.context.text != second.context.text
        [now], [before] = second.changed, second.outdated
        assert now.text == before.text and now.answers != before.answers and now == second.questions[0]
        assert before.answers[0] in first.context.text and now.answers[0] in second.context.text
        assert now.text not in [q.text for q in first.questions] and len(first.questions) == 2
        assert {q.answers for q in first.questions} < {q.answers for q in second.questions}
    assert found.items[0].context.title != found.items[4].context.title  # another block
    further = BENCHMARKS["revisits"](4, 0, len, apart=2, facts=3).items
    for first, second in zip(further[:2], further[2:], strict=True):
        assert first.context.title == second.context.title and not second.changed
        assert not {q.text for q in first.questions} & {q.text for q in second.questions}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_osf_trains_and_merges_or_refuses(precision: Any) -> None:
    recipe = SMALL.but(train="osf", epochs=8, lr=1e-2, precision=precision)
    lm = tiny_lm()
    done = inject(lm, [SET], recipe)
    assert done.trained.losses[-1] < done.trained.losses[0] and done.merge_error < 1e-4
    assert {k: v.shape for k, v in done.lm.model.state_dict().items()} == {
        k: v.shape for k, v in lm.model.state_dict().items()}
    with pytest.raises(ModelError, match="orthogonal subspace does not know the layers"):
        inject(tiny_lm("gpt2"), [SET], recipe)


def test_recipes_without_rehearsal_keep_the_cells_that_they_had() -> None:
    from selfparam.experiments.spec import cells_of, read_table

    for cell in cells_of(read_table(Path(__file__).parent.parent / "tables" / "figure2.toml")):
        options = json.loads(cell.settings)["options"]
        if "recipe" in options:
            assert ("rehearsal" in options["recipe"]) == (cell.method.label == "SELF-PARAM, rehearsal")
        assert options.get("keep") != "nothing"
