"""Pairs for the contexts of a table: the data's own, written by a model or an endpoint, or with mistakes put in.

Pairs that ask what is asked afterwards, in the same words, are left out. Refuses to know methods.
Source: arXiv 2410.00487, section 3.2; the erring author is ours (docs/paper.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from selfparam.data.items import Item
from selfparam.errors import TableError
from selfparam.experiments.spec import AuthorSpec
from selfparam.lm import LM
from selfparam.metrics.qa_f1 import qa_f1, tokens
from selfparam.targets import Author, EndpointAuthor, LocalAuthor, cached, write_pairs
from selfparam.targets.files import Written
from selfparam.targets.recommend import prompt_named, recommendations
from selfparam.types import Context, Sentence, TargetSet


def sets_by(name: str, authors: dict[str, AuthorSpec], lm: LM, items: Sequence[Item], seed: int, cache: Path,
            says: Callable[[str], None] = lambda text: None) -> list[TargetSet]:
    """A target set (pairs only) for each item; one about which nobody wrote anything usable is empty.

    Raises TableError where the data has no pairs of its own, AuthorError where an author fails.
    """
    spec = authors[name]
    if spec.kind == "erring":
        right = sets_by(spec.of, authors, lm, items, seed, cache, says)
        return with_mistakes(right, spec.wrong, seed, f"{name} {spec.wrong:g}")
    if spec.kind == "oracle":
        if not all(item.pairs for item in items):
            raise TableError(f"author '{name}': this data has no pairs of its own: use a model or an endpoint")
        return _unasked([TargetSet(item.context, item.pairs, (), "oracle") for item in items], items)
    if spec.kind == "recommending":
        of = sets_by(spec.of, authors, lm, items, seed, cache, says) if spec.of else [
            TargetSet(item.context, ()) for item in items]
        says(f"recommendations by {name}: {len(items)} conversations")
        more = recommendations(lm, [item.context for item in items], turns=spec.pairs,
                               prompt=prompt_named(spec.prompt or "recommend"), max_new_tokens=spec.tokens)
        return [replace(one, related=(*one.related, *own), author=f"{one.author} {name}".strip())
                for one, own in zip(of, more, strict=True)]
    author = _author(spec, lm, seed)

    def make(contexts: Sequence[Context]) -> list[Written]:
        def progress(kept: int, wanted: int) -> None:
            says(f"pairs by {name}: {kept} of {wanted} about {len(contexts)} contexts")

        progress(0, spec.pairs * len(contexts))
        return write_pairs(contexts, author, pairs=spec.pairs, rounds=spec.rounds, strict=False, progress=progress)

    found = cached(cache, [item.context for item in items], author, spec.pairs, spec.rounds, make)
    sets = [TargetSet(item.context, sentences, (), author.id)
            for item, (sentences, _) in zip(items, found, strict=True)]
    return _unasked(sets, items)


def _author(spec: AuthorSpec, lm: LM, seed: int) -> Author:
    if spec.kind == "endpoint":
        return EndpointAuthor(spec.model, spec.url or None, prompt=spec.prompt or "paper")
    writer = lm if spec.model in ("self", lm.name) else LM.load(spec.model)
    return LocalAuthor(writer, spec.prompt or "brief", temperature=spec.temperature, seed=seed, checked=spec.checked)


def _unasked(sets: Sequence[TargetSet], items: Sequence[Item]) -> list[TargetSet]:
    """The sets without pairs that ask a question of their own item in the same words (as F1 compares them)."""
    found = []
    for one, item in zip(sets, items, strict=True):
        asked = {tuple(tokens(q.text)) for q in item.questions}
        found.append(replace(one, related=tuple(s for s in one.related if tuple(tokens(s.prompt)) not in asked)))
    return found


def with_mistakes(sets: Sequence[TargetSet], wrong: float, seed: int, author: str) -> list[TargetSet]:
    """The sets with a share `wrong` of answers replaced by those of other contexts, to the question most like theirs.

    Which pairs err is drawn for each set by itself, so that a set does not depend on how many others there are.
    """
    found = []
    for i, one in enumerate(sets):
        rng = random.Random(f"{seed}/{one.context.id}")
        chosen = set(rng.sample(range(len(one.related)), round(wrong * len(one.related))))
        neighbours = [sets[(i + k) % len(sets)] for k in range(1, min(len(sets), 40))]
        others = [s for other in neighbours for s in other.related]
        related = tuple(replace(s, completion=_mistake(s, others)) if k in chosen else s
                        for k, s in enumerate(one.related))
        found.append(replace(one, related=related, author=author))
    return found


def _mistake(pair: Sentence, others: Sequence[Sentence]) -> str:
    """The answer, sharing no word with the right one, to the other question that shares most words with this one."""
    asked = set(tokens(pair.prompt))
    wrong = [s for s in others if qa_f1(s.completion, [pair.completion]) == 0]
    if not wrong:
        raise TableError("the erring author finds no wrong answer: use more contexts")
    return max(wrong, key=lambda s: len(asked & set(tokens(s.prompt)))).completion
