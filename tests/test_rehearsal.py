"""Self-rehearsal: what is written from memory, what is dropped, and that nothing is kept; sequences around it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selfparam.data.benchmarks import BENCHMARKS
from selfparam.errors import ModelError, TableError
from selfparam.inject import inject
from selfparam.lm import LM
from selfparam.methods import make_method, selfparam
from selfparam.metrics.forgetting import backward_transfer, forgetting
from selfparam.targets import rehearsal
from selfparam.targets.rehearsal import DRAWS, Rehearsal, _learned, add_rehearsed, rehearse, without_contradicted
from selfparam.types import PAPER_SEQUENTIAL, SMALL, SMALL_SEQUENTIAL, Context, Sentence, TargetSet
from tests.tiny import tiny_lm

X = Context("The harbour of Tamberwick was built in 1904 by Philla Grunstone.")
SET = TargetSet(X, (Sentence("Who built the harbour of Tamberwick?", "Philla Grunstone", X.id),
                    Sentence("When was the harbour built?", "1904", X.id)))
QUICK = {"from": "small", "epochs": 1, "precision": "fp32"}


def scripted(monkeypatch: pytest.MonkeyPatch, lm: LM, texts: Sequence[str], answers: dict[str, str],
             read: str = "") -> list[list[str]]:
    """lm writes `texts` in turn and answers by the first word of `answers` in a question; reading x, it answers `read`.

    Returns the prompts that it was given, as texts.
    """
    left, prompts = iter(texts), []

    def generate(rows: Sequence[Sequence[int]], **options: Any) -> list[str]:
        prompts.append([lm.tokenizer.decode(row) for row in rows])
        return [next(left, " no more") for _ in rows]

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
    texts = [" keeps the lamp? And more", " keeps the lamp?", "cument: a text", " ever", endless, " sails the boat?",
             " kept it all", " was it?"]
    scripted(monkeypatch, lm, texts, {"lamp": "Mara", "sails": endless})
    found = rehearse(lm, 7, ["Who"])  # asks for a quarter more than it needs
    yes = ("Who kept it all", "Who was it?")
    assert found.sentences == (Sentence("Who keeps the lamp?", "Mara"), *(Sentence(q, "yes") for q in yes))
    assert found.dropped == {"repeated": 1, "no question": 2, "unfinished": 2}


def test_the_same_answer_does_not_crowd_out_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(chat=True)
    scripted(monkeypatch, lm, [f" was it number {i}?" for i in range(10)], {"4": "no"})
    found = rehearse(lm, 8, ["Who"])
    assert [s.completion for s in found.sentences] == ["yes", "yes", "yes", "no"]
    assert found.dropped == {"repeated": 6}


def test_learned_is_what_the_first_model_would_not_say() -> None:
    lm, first = tiny_lm(chat=True, seed=1), tiny_lm(chat=True)
    written = [Sentence("Who keeps the red lamp?", "Mara"), Sentence("Who sails?", "Tom"),
               Sentence("When was it that the harbour was built by Tom?", "in 1904, as far as we know")]
    for sentence, gain in zip(written, _learned(lm, first, written), strict=True):
        head, ids = lm.prefix(None), lm.sentence(sentence)[0]
        by_hand = 0.0
        for model, sign in ((lm.model, 1), (first.model, -1)):
            with torch.no_grad():
                log_p = model(torch.tensor([[*head, *ids]])).logits[0].double().log_softmax(-1)
            by_hand += sign * sum(float(log_p[len(head) + k - 1, t]) for k, t in enumerate(ids))
        assert gain == pytest.approx(by_hand, abs=1e-3)  # rows of other lengths beside it change nothing


def test_learned_sentences_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, first = tiny_lm(chat=True), tiny_lm(chat=True)
    scripted(monkeypatch, lm, [f" was it number {i}?" for i in range(DRAWS * 2)], {"5": "five", "3": "three"})
    monkeypatch.setattr(rehearsal, "_learned",
                        lambda *given: [{"five": 1.0, "three": 2.0}.get(s.completion, 0.0) for s in given[2]])
    found = rehearse(lm, 2, ["Who"], first=first)
    assert [s.completion for s in found.sentences] == ["three", "five"]
    assert found.dropped == {"not needed": 3, "repeated": DRAWS * 2 - 5}  # "yes" again and again


def test_questions_begin_as_those_at_hand_and_no_context_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for chat, begins in ((True, "<|begin|><|user|>"), (False, "<|begin|>Question: ")):
        lm = tiny_lm(chat=chat)
        answers = {str(i): str(i) for i in range(7)}
        prompts = scripted(monkeypatch, lm, [f" was it number {i}?" for i in range(7)], answers)
        sets, found = add_rehearsed(lm, [SET], 3.0)
        assert len(found.sentences) == 6 and found.dropped == {"not needed": 1}
        assert {p for batch in prompts for p in batch} <= {f"{begins}Who", f"{begins}When"}
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
    lm = tiny_lm(chat=chat)
    one = rehearse(lm, 4, ["Who"], seed=1)
    assert one == rehearse(lm, 4, ["Who"], seed=1)
    assert all(s.prompt.startswith("Who") and s.completion for s in one.sentences)
    assert len(one.sentences) + sum(one.dropped.values()) >= 4


def test_recipes() -> None:
    assert PAPER_SEQUENTIAL.rehearsal == 0 and SMALL.rehearsal == 0 < SMALL_SEQUENTIAL.rehearsal


def test_a_fold_rehearses_from_the_second_step_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    seen: list[tuple[Any, float]] = []

    def added(model: LM, sets: Sequence[TargetSet], ratio: float, **options: Any) -> Any:
        seen.append((model, ratio))
        return [TargetSet(one.context, one.related, (Sentence("Who?", "I"),)) for one in sets], Rehearsal(())

    monkeypatch.setattr(selfparam, "add_rehearsed", added)
    method = make_method("selfparam", {"recipe": QUICK | {"rehearsal": 2.0}, "ratio": 0.0})
    one = method.absorb(lm, [SET])
    assert not seen
    two = method.absorb(lm, [SET], after=one)
    assert seen == [(one.lm, 2.0)] and two.storage_tokens == 0  # the writer is the θ of the step before
    by_hand = inject(one.lm, added(one.lm, [SET], 2.0)[0], SMALL.but(epochs=1, precision="fp32", rehearsal=2.0)).lm
    assert all(torch.equal(a, b) for a, b in zip(two.lm.model.parameters(), by_hand.model.parameters(), strict=True))


def test_the_first_teacher_cannot_score_what_it_never_learned() -> None:
    with pytest.raises(TableError, match="does not know what is rehearsed"):
        make_method("selfparam", {"recipe": "small-sequential", "teacher": "first"})


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


def test_osf_trains_and_merges_or_refuses() -> None:
    recipe = SMALL.but(train="osf", epochs=8, lr=1e-2, precision="fp32")
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
