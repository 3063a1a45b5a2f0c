"""Conversations as targets: system turns only, the recommendation prompt, and the prompt of the released run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from selfparam.data.conversations import Turn, conversation
from selfparam.data.files import json_lines
from selfparam.errors import DataError, ModelError
from selfparam.inject import Injection, inject
from selfparam.inject.pairs import build_rows
from selfparam.lm import LM
from selfparam.methods import make_method
from selfparam.targets.recommend import (
    BARE,
    RECOMMEND,
    ft_c,
    recommend,
    recommendations,
    request,
    shortened,
    system_turns,
)
from selfparam.types import Context, Recipe, Sentence, TargetSet
from tests.test_recall import INSPIRED, needs_inspired
from tests.tiny import WINDOW, tiny_lm

TALK = conversation([Turn("System", "Hello."), Turn("User", "I like Heat."), Turn("System", "See Up."),
                     Turn("User", "And then?"), Turn("System", "Ran.")])


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "base"])
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny_lm("llama", chat=request.param)


def test_system_turns() -> None:
    assert system_turns(TALK) == (
        Sentence("System: ", "Hello.", TALK.id),
        Sentence("System: Hello.\nUser: I like Heat.\nSystem: ", "See Up.", TALK.id),
        Sentence("System: Hello.\nUser: I like Heat.\nSystem: See Up.\nUser: And then?\nSystem: ", "Ran.", TALK.id),
    )
    with pytest.raises(DataError, match="no conversation"):
        system_turns(Context("Heat is a film."))


def test_the_baselines_are_trained_on_completions_alone(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[TargetSet, Recipe]] = []

    def watched(given: LM, sets: Sequence[TargetSet], recipe: Recipe, **_: object) -> Injection:
        trained.append((sets[0], recipe))
        return inject(given, sets, recipe.but(precision="fp32"))

    monkeypatch.setattr("selfparam.methods.finetune.inject", watched)
    pairs = TargetSet(TALK, (Sentence("What did I like?", "Heat", TALK.id),), (Sentence("", "Rain fell."),), "me")
    for on in ("turns", "answers"):
        make_method("finetune", {"on": on, "recipe": "paper-recommend"}).absorb(lm, [pairs])
    assert [one for one, _ in trained] == [ft_c(TALK), replace(pairs, unrelated=())]
    for one, recipe in trained:
        assert (recipe.objective, recipe.loss_on, recipe.epochs) == ("next-word", "answer", 1)
        rows, _ = build_rows(lm, [one], recipe)
        assert len(rows) == len(one.related)
        for row, sentence in zip(rows, one.related, strict=True):
            scored = lm.decode(row.student[row.first:]).strip()
            assert scored == sentence.completion


def test_recommend_gives_a_text_for_each_conversation(lm: LM) -> None:
    said = ["\nUser: Hi\nSystem: ", "\nUser: I like Heat.\nSystem: "]
    both = recommend(lm, said, max_new_tokens=12)
    assert len(both) == 2
    rows = [[*lm.prefix(None), *lm.question(request(one))] for one in said]
    stop = None if lm.is_chat else "\nQuestion:"
    assert both == lm.generate(rows, max_new_tokens=12, stop=stop)
    assert recommend(lm, said[:1], [TALK.text], max_new_tokens=12) != both[:1]
    assert recommend(lm, said, max_new_tokens=12, prompt=BARE) != both
    with pytest.raises(ModelError, match="does not fit the window"):
        recommend(lm, ["\nUser: " + "x" * 4 * WINDOW])
    with pytest.raises(ValueError, match="where the conversation goes"):
        request("\nUser: Hi\nSystem: ", "Recommend a film.")


def test_shortened_drops_the_oldest_turns(lm: LM) -> None:
    said = "\nUser: One.\nSystem: Two.\nUser: Three.\nSystem: "
    whole = len(lm.question(request(said)))
    assert shortened(lm, said, whole) == said
    assert shortened(lm, said, whole - 1) == "\nSystem: Two.\nUser: Three.\nSystem: "
    assert shortened(lm, said, 1) == "\nUser: Three.\nSystem: "
    assert shortened(lm, said, whole - 1, BARE) == said
    plain = "User: One.\nUser: Two.\nSystem: "  # no line break in front: a row of the user's own
    assert shortened(lm, plain, len(lm.question(request(plain)))) == plain
    assert shortened(lm, plain, 1) == "\nUser: Two.\nSystem: "


def test_recommendations_of_the_teacher_become_targets(lm: LM) -> None:
    short = conversation([Turn("System", "Hello."), Turn("User", "Bye.")])
    found = recommendations(lm, [TALK, short], turns=5, max_new_tokens=12)
    assert found[1] == ()
    before = ["\nSystem: Hello.\nUser: I like Heat.\nSystem: ",
              "\nSystem: Hello.\nUser: I like Heat.\nSystem: See Up.\nUser: And then?\nSystem: "]
    texts = recommend(lm, before, [TALK.text] * 2, max_new_tokens=12)
    assert found[0] == tuple(Sentence(request(said), text.strip(), TALK.id)
                             for said, text in zip(before, texts, strict=True) if text.strip())
    [one] = recommendations(lm, [TALK], max_new_tokens=12)
    assert [s.prompt for s in one] == [request(before[1])]


def test_the_prompt_ends_with_the_conversation() -> None:
    assert RECOMMEND.endswith("Here is the conversation: {input}") and "20 recommendations" in RECOMMEND
    assert request("{input}") == RECOMMEND  # braces of a conversation stay


@needs_inspired
def test_the_prompt_is_that_of_the_released_run() -> None:
    files = (json_lines(INSPIRED / name) for name in ("test.jsonl.gz", "mistral_base_outputs.jsonl.gz"))
    for (row, _), (output, _) in zip(*files, strict=True):
        assert output["text"].startswith(f"[INST] {request(row['input'])} [/INST]")
