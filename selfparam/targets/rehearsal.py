"""Self-rehearsal: what a model writes from memory before it learns something new, so that it keeps what it knows.

Nothing is stored: questions are sampled from the weights, begun with the first words of the step's own questions, and
answered from the weights; afterwards they are forgotten. Of many sentences those are kept that the model has learned
since it was the first θ. What the new context contradicts is left out, so that a changed fact can win. Refuses to
know training and which contexts were injected before.
Sources: ours; rehearsing a network's own samples is Robins 1995 (pseudo-rehearsal), questions out of an empty user turn
are Magpie's (arXiv 2406.08464).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from selfparam.lm import LM
from selfparam.metrics.qa_f1 import tokens
from selfparam.types import Sentence, TargetSet, content_hash

QUESTION_TOKENS, ANSWER_TOKENS = 40, 24
DRAWS = 4  # sentences written for each that is kept, where the first θ can tell which ones were learned
SAME_ANSWER = 3  # sentences with the same answer at most: what is asked most often would crowd out the rest
_WORD = re.compile(r"\w+(?:-\w+)*")
_SCORED = 16  # sentences scored together: whole vocabularies are large


@dataclass(frozen=True)
class Rehearsal:
    """Sentences from memory, and how many were dropped for which reason.

    Reasons: "unfinished" (longer than allowed), "no question" (no line of at least three words), "repeated" (the same
    question, or an answer for the fourth time), "not needed" (there were enough, or others differed more from what the
    first θ says), "contradicted" (about the new context, which answers it otherwise).
    """

    sentences: tuple[Sentence, ...]
    dropped: dict[str, int] = field(default_factory=dict)


def add_rehearsed(lm: LM, sets: Sequence[TargetSet], ratio: float, *, first: LM | None = None, temperature: float = 1.0,
                  seed: int = 0) -> tuple[list[TargetSet], Rehearsal]:
    """The same sets with up to `ratio` sentences from memory for each pair among the unrelated ones, and a report.

    first: θ before anything was injected, where it is at hand.
    """
    n = round(ratio * sum(len(one.related) for one in sets))
    openings = [s.prompt.split()[0] for one in sets for s in one.related if s.prompt.split()]
    seed = int(content_hash(str(seed), *(one.context.id for one in sets))[:8], 16)  # other samples in every step
    written = rehearse(lm, n, openings, first=first, temperature=temperature, seed=seed)
    found = without_contradicted(lm, written, sets)
    shares = [found.sentences[i :: len(sets)] for i in range(len(sets))]
    return [replace(one, unrelated=(*one.unrelated, *part)) for one, part in zip(sets, shares, strict=True)], found


def rehearse(lm: LM, n: int, openings: Sequence[str] = (), *, first: LM | None = None, temperature: float = 1.0,
             seed: int = 0) -> Rehearsal:
    """Up to n distinct questions that the model samples from memory, with its most likely answers.

    openings: words that questions begin with; without any, the model begins them itself. temperature: of the questions.
    """
    rng = random.Random(seed)
    drawn = n * DRAWS if first else n + n // 4
    begun = [rng.choice(openings) if openings else "" for _ in range(drawn)]
    questions: dict[tuple[str, ...], str] = {}
    dropped: Counter[str] = Counter()
    for question, fault in _written(lm, begun, temperature, seed):
        fault = fault or ("repeated" if tuple(tokens(question)) in questions else "")
        if fault:
            dropped[fault] += 1
        else:
            questions[tuple(tokens(question))] = question
    order = list(questions.values())
    written = [Sentence(q, a) for q, a in zip(order, _answers(lm, order), strict=True) if a]
    dropped["unfinished"] += len(order) - len(written)
    if first:
        learned = dict(zip(written, _learned(lm, first, written), strict=True))
        written.sort(key=lambda s: -learned[s])
    kept: list[Sentence] = []
    answers: Counter[tuple[str, ...]] = Counter()
    for sentence in written:
        answer = tuple(tokens(sentence.completion))
        answers[answer] += 1
        if answers[answer] > SAME_ANSWER:
            dropped["repeated"] += 1
        elif len(kept) == n:
            dropped["not needed"] += 1
        else:
            kept.append(sentence)
    return Rehearsal(tuple(kept), dict(+dropped))


@torch.no_grad()
def _learned(lm: LM, first: LM, sentences: Sequence[Sentence]) -> list[float]:
    """log P_θ(s) - log P_first(s) of each sentence without any context, in nats."""
    found: list[float] = []
    head = lm.prefix(None)
    for start in range(0, len(sentences), _SCORED):
        rows = [([*head, *lm.sentence(s)[0]], len(head)) for s in sentences[start : start + _SCORED]]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row, _ in rows])
        gain = _log_probs(lm, ids) - _log_probs(first, ids)
        found += [float(gain[i, begin - 1 : len(row) - 1].sum()) for i, (row, begin) in enumerate(rows)]
    return found


def _log_probs(lm: LM, ids: torch.Tensor) -> torch.Tensor:
    """[B, T - 1]: log-probability of every token but the first, in nats. Padding behind a row changes nothing in it."""
    ids = ids.to(lm.device)
    logits: torch.Tensor = lm.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu()


def without_contradicted(lm: LM, written: Rehearsal, sets: Sequence[TargetSet]) -> Rehearsal:
    """Without the sentences that name something of a new context and that the model, reading it, answers otherwise."""
    texts = {one.context.text: set(_WORD.findall(one.context.text)) for one in sets}
    read = {i: text for i, s in enumerate(written.sentences) for text, words in texts.items()
            if any(word[0].isupper() and word in words for word in _WORD.findall(s.prompt)[1:])}
    answers = _answers(lm, [written.sentences[i].prompt for i in read], list(read.values()))
    gone = {i for i, a in zip(read, answers, strict=True) if tokens(a) != tokens(written.sentences[i].completion)}
    kept = tuple(s for i, s in enumerate(written.sentences) if i not in gone)
    return Rehearsal(kept, {**written.dropped, **({"contradicted": len(gone)} if gone else {})})


def _written(lm: LM, openings: Sequence[str], temperature: float, seed: int) -> list[tuple[str, str]]:
    """Questions that begin with the openings, each with its fault ("" where it has none)."""
    head, between = (lm.chat_parts()[0], lm.chat_parts()[1]) if lm.is_chat else (lm.bos, [])
    begun = [lm.encode(o) if lm.is_chat else lm.encode(f"Question: {o}".rstrip()) for o in openings]
    texts = lm.generate([[*head, *ids] for ids in begun], max_new_tokens=QUESTION_TOKENS, temperature=temperature,
                        seed=seed, stop="\n", stop_at=between)
    found = []
    for opening, text in zip(openings, texts, strict=True):
        question = re.split(r"(?<=[?？])\s", f"{opening}{text}".strip())[0]
        broken = opening and text[:1].isalpha()  # the first word went on: "Do" + "cument"
        whole = len(lm.encode(text)) < QUESTION_TOKENS or question.endswith(("?", "？"))
        fault = "no question" if broken or len(question.split()) < 3 else "" if whole else "unfinished"
        found.append((question, fault))
    return found


def _answers(lm: LM, questions: Sequence[str], contexts: Sequence[str] | None = None) -> list[str]:
    """Most likely answers, from memory or with the contexts in front; "" where one has no end."""
    given = lm.answer(questions, contexts, max_new_tokens=ANSWER_TOKENS)
    return [a if len(lm.encode(a)) < ANSWER_TOKENS - 1 else "" for a in given]
