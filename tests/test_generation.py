"""What LM puts around an answer and how it is written: batches, stops, templates, settings of the model's own."""

from __future__ import annotations

from typing import Any

import pytest

from selfparam.lm import LM
from selfparam.types import Sentence
from tests.tiny import WINDOW, tiny_lm


def batches(lm: LM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """Lengths of the rows of every batch that is written, and how many tokens may follow."""
    found: list[tuple[list[int], int]] = []

    def written(rows: list[list[int]], new: int, *rest: Any) -> list[str]:
        found.append(([len(r) for r in rows], new))
        return ["" for _ in rows]

    monkeypatch.setattr(lm, "_generate_batch", written)
    return found


def test_a_batch_is_limited_by_its_longest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    found = batches(lm, monkeypatch)
    lm.generate([[5] * n for n in (400, 20, 400, 400, 400)], max_new_tokens=10, batch_tokens=820)
    assert found == [([20, 400], 10), ([400, 400], 10), ([400], 10)]


def test_an_answer_is_not_shorter_because_of_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    found = batches(lm, monkeypatch)
    lm.generate([[5] * n for n in (WINDOW - 3, 30, 40)], max_new_tokens=24)
    assert found == [([30, 40], 24), ([WINDOW - 3], 3)]


def test_answers_are_the_likeliest_words_whatever_the_model_was_set_to() -> None:
    lm = tiny_lm("llama", chat=True)
    questions = ["Who built the harbour of Tamberwick?", "What is blue?"]
    expected = lm.answer(questions)
    lm.model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=3, min_p=0.9,
                                      typical_p=0.1, do_sample=True, top_k=1)
    assert lm.answer(questions) == expected
    rows = [lm.instruction("Write.")] * 4
    assert len(set(lm.generate(rows, max_new_tokens=8, temperature=1.0))) > 1


def test_a_blank_in_front_of_a_turns_end_ends_no_answer() -> None:
    lm = tiny_lm("llama", chat=True)
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace("<|end|>", "\n<|end|>\n")
    [end] = lm.encode("<|end|>", template=True)
    assert lm.chat_parts()[2][0] != end and lm.stop_ids() == [end]
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace("\n<|end|>", " ")
    lm._chat = None
    assert lm.stop_ids() == [end]  # the tokenizer's own


def test_a_turn_with_a_channel_of_its_own_for_the_words() -> None:
    lm = tiny_lm("llama", chat=True)
    plain = lm.sentence(Sentence("Who?", "Mara", "x"))
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace(
        "<|assistant|>{{ message", "<|assistant|>final: {{ message")
    lm._chat = None
    ids, prompt = lm.sentence(Sentence("Who?", "Mara", "x"))
    assert ids[:prompt] == [*plain[0][: plain[1]], *lm.encode("final: ")]
    assert ids[prompt:] == plain[0][plain[1] :]
    assert lm.question("Who?") == ids[:prompt]


def test_a_template_that_prints_the_day_gives_the_same_rows_on_every_day() -> None:
    lm = tiny_lm("llama", chat=True)
    head = lm.decode(lm.chat_parts()[0])
    lm.tokenizer.chat_template = "\n{{ strftime_now('%d %b %Y %S.%f') }}" + lm.tokenizer.chat_template
    lm._chat = None
    assert lm.decode(lm.chat_parts()[0]) == "\n26 Jul 2024" + head
