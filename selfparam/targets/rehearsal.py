"""Self-rehearsal: what a model writes from memory before it learns something new, so that it keeps what it knows.

Nothing is stored: questions are sampled from the weights, out of an empty user turn, and answered from the weights;
afterwards they are forgotten. Most of them are what the model learned since it was the first θ: sampling is guided away
from what that one would ask, and only new and sure answers are kept. The others the first θ writes, which is also their
teacher. What the new context contradicts is left out, so that a changed fact can win. Refuses to know training and
which contexts came before.
Sources: ours; rehearsing a network's own samples is Robins 1995 (pseudo-rehearsal), questions out of an empty user turn
are Magpie's (arXiv 2406.08464), two models' log-probabilities weighed against each other are contrastive decoding
(arXiv 2210.15097), here in the form of classifier-free guidance (arXiv 2306.17806).
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
from selfparam.targets.parse import length
from selfparam.types import Sentence, TargetSet, content_hash

QUESTION_TOKENS, ANSWER_TOKENS = 28, 16
AT_ONCE = 256  # questions of one round, written together: rows are short
OFTEN = 5  # sentences with the same names in the question and the same answer
WORTH = 0.1  # share of a round that must be kept for another one
FEW = 40  # sentences of the first θ, at least
PLAIN = 200  # sentences, at most, where nothing tells what was learned
LEARNED = 2.0  # nats by which an answer must be likelier than under the first θ
SURE = -2.5  # log-probability, in nats, that a learned answer must have: below it most are guesses
GUIDED = 0.8  # share of the sentences that are about what was learned
_SCORED = 64  # sentences scored together: whole vocabularies are large
_WORD = re.compile(r"\w+(?:-\w+)*")


@dataclass(frozen=True)
class Rehearsal:
    """Sentences from memory, and how many were dropped for which reason.

    Reasons: "unfinished" (longer than allowed), "no question" (no line of at least three words), "repeated" (the same
    question), "not learned" (the first θ would answer so too, or it is a guess), "not needed" (enough about the same
    fact), "contradicted" (about the new context, which answers it otherwise).
    """

    sentences: tuple[Sentence, ...]
    dropped: dict[str, int] = field(default_factory=dict)


def add_rehearsed(lm: LM, sets: Sequence[TargetSet], n: int, *, first: LM | None = None, temperature: float = 1.0,
                  seed: int = 0) -> tuple[list[TargetSet], Rehearsal]:
    """The same sets with up to n sentences from memory among their unrelated ones, and a report.

    first: θ before anything was injected, where it is at hand.
    """
    seed = int(content_hash(str(seed), *(one.context.id for one in sets))[:8], 16)  # other samples in every step
    written = rehearse(lm, n, first=first, temperature=temperature, seed=seed)
    found = without_contradicted(lm, written, sets)
    shares = [found.sentences[i :: len(sets)] for i in range(len(sets))]
    return [replace(one, unrelated=(*one.unrelated, *part)) for one, part in zip(sets, shares, strict=True)], found


def rehearse(lm: LM, n: int, *, first: LM | None = None, temperature: float = 1.0, seed: int = 0) -> Rehearsal:
    """Up to n distinct questions that the model samples from memory, with its most likely answers.

    Four fifths of them about what was learned since `first`, a few about each fact, the others by `first`. It asks on
    as long as that brings something new, so their number grows with what was learned.
    Without `first` 200 questions at most, as they come. temperature: of the questions.
    """
    dropped: Counter[str] = Counter()
    learned: list[Sentence] = []
    if first is not None:
        learned = _learned(lm, first, round(GUIDED * n), temperature, seed, dropped)
    kept = learned[: round(GUIDED * n)]
    begin = [s.prompt.split()[0] for s in kept]
    asked = {s.prompt for s in kept}
    wanted = min(n - len(kept), max(FEW, round(len(kept) / GUIDED) - len(kept)) if first else PLAIN)
    others = [s for s in _written(first or lm, wanted * 3 // 2, begin, None, temperature, seed - 1, dropped)
              if s.prompt not in asked]
    dropped["not needed"] += len(learned) - len(kept) + max(0, len(others) - wanted)
    return Rehearsal((*(replace(s, rehearsed=True) for s in kept), *others[:wanted]), dict(+dropped))


def _learned(lm: LM, first: LM, n: int, temperature: float, seed: int, dropped: Counter[str]) -> list[Sentence]:
    """Sure answers that `first` would not give, some of each, to questions of several rounds.

    Ends with the round that brings too few (not the first, which has no openings yet), or that reaches n.
    """
    found: list[Sentence] = []
    asked: set[tuple[str, ...]] = set()
    told: Counter[tuple[object, ...]] = Counter()
    opened: set[str] = set()  # first words: what is no name in "Tell me: When was Farwin built?"
    begun, brought = seed, AT_ONCE
    while (brought >= WORTH * AT_ONCE or seed == begun + 1) and len(found) < n:
        before, seed = len(found), seed + 1
        # an empty turn opens with a document half of the time; the first words of questions keep to questions
        openings = [s.prompt.split()[0] for s in found]
        written = _written(lm, AT_ONCE, openings, first, temperature, seed, dropped)
        new = [s for s in written if tuple(tokens(s.prompt)) not in asked]
        asked.update(tuple(tokens(s.prompt)) for s in new)
        opened.update(s.prompt.split()[0] for s in new)
        sure = [s for s, (p, gain) in zip(new, _scores(lm, first, new), strict=True) if p > SURE and gain > LEARNED]
        for one in sure:
            names = frozenset(w for w in _WORD.findall(one.prompt)[1:] if w[0].isupper()) - opened
            fact = (names, *tokens(one.completion))
            told[fact] += 1
            if told[fact] <= OFTEN:
                found.append(one)
            else:
                dropped["not needed"] += 1
        brought = len(found) - before
        dropped["repeated"] += len(written) - len(new)
        dropped["not learned"] += len(new) - len(sure)
    return found


@torch.no_grad()
def _scores(lm: LM, first: LM, sentences: Sequence[Sentence]) -> list[tuple[float, float]]:
    """log P_θ(a|q) of each sentence without any context, and how much that is above log P_first(a|q), in nats."""
    found: list[tuple[float, float]] = []
    head = lm.prefix(None)
    for start in range(0, len(sentences), _SCORED):
        parts = [lm.sentence(s) for s in sentences[start : start + _SCORED]]
        rows = [([*head, *part], len(head) + prompt) for part, prompt in parts]
        width = max(len(row) for row, _ in rows)
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row, _ in rows])
        own, others = _log_probs(lm, ids), _log_probs(first, ids)
        for i, (row, begin) in enumerate(rows):
            sure, base = (float(p[i, begin - 1 : len(row) - 1].sum()) for p in (own, others))
            found.append((sure, sure - base))
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


def _written(lm: LM, n: int, openings: Sequence[str], first: LM | None, temperature: float, seed: int,
             dropped: Counter[str]) -> list[Sentence]:
    """Distinct sentences of n that are begun, each with one of the openings if any; what is dropped is counted."""
    rng = random.Random(seed)
    begun = [rng.choice(openings) if openings else "" for _ in range(n)]
    head, between = lm.chat_parts()[:2] if lm.is_chat else (lm.bos, [])
    rows = [[*head, *lm.encode(one if lm.is_chat else f"Question: {one}".rstrip())] for one in begun]
    texts = lm.generate(rows, max_new_tokens=QUESTION_TOKENS, temperature=temperature, seed=seed, stop="?",
                        stop_at=between, batch_rows=AT_ONCE, against=first)
    questions: dict[tuple[str, ...], str] = {}
    for opening, text in zip(begun, texts, strict=True):
        question = f"{opening}{text}".strip().split("\n")[0].strip()
        broken = opening and text[:1].isalpha()  # the first word went on: "Do" + "cument"
        whole = len(lm.encode(text)) < QUESTION_TOKENS - 1 or "\n" in text.strip()
        asked = question if re.search(r"[.!?。！？]$", question) else f"{question}?"
        fault = ("no question" if broken or length(question) < 3 else "unfinished" if not whole
                 else "repeated" if tuple(tokens(asked)) in questions else "")
        if fault:
            dropped[fault] += 1
        else:
            questions[tuple(tokens(asked))] = asked
    order = list(questions.values())
    answers = _answers(lm, order)
    dropped["unfinished"] += answers.count("")
    return [Sentence(q, a) for q, a in zip(order, answers, strict=True) if a]


def _answers(lm: LM, questions: Sequence[str], contexts: Sequence[str] | None = None) -> list[str]:
    """Most likely answers, from memory or with the contexts in front; "" where one has no end."""
    given = lm.answer(questions, contexts, max_new_tokens=ANSWER_TOKENS)
    return [a if len(lm.encode(a)) < ANSWER_TOKENS - 1 else "" for a in given]
