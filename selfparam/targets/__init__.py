"""x -> ℰ: the target sentences of contexts. An author writes pairs in rounds until enough distinct ones are there.

A local author is checked: a pair is kept only if the author, reading x, answers its question as it wrote. Refuses to
know what unrelated sentences are, and how they are trained on. Sources: SELF-PARAM, arXiv 2410.00487, section 3.2
(construction of the target sentence set) and A.3; the check is the roundtrip consistency of arXiv 1906.05416.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from selfparam.errors import TargetError
from selfparam.lm import LM, Progress
from selfparam.metrics.qa_f1 import qa_f1, tokens
from selfparam.targets.authors import Author, EndpointAuthor, LocalAuthor
from selfparam.targets.files import cached, read_pairs, read_sets, write_sets
from selfparam.targets.parse import UNSPACED, Pair, Report, keep_pairs, parse_pairs, plain
from selfparam.types import Context, Sentence, TargetSet

__all__ = [
    "Author", "EndpointAuthor", "LocalAuthor", "Report", "build_target_set", "cached", "read_pairs", "read_sets",
    "write_pairs", "write_sets",
]

#: Rounds at most. An author who writes enough at once needs one.
ROUNDS = 10
#: Rounds in a row without a new pair after which an author that may cost money is not asked again.
IDLE = 2
#: Pairs asked for beyond those that lack, because some will be dropped.
_SPARE = 2
#: Texts that a local author samples together: a later round asks it several times about each of a few contexts, which
#: takes little longer than once.
TOGETHER = 12


def write_pairs(
    contexts: Sequence[Context], author: Author, *, pairs: int = 15, rounds: int = ROUNDS,
    progress: Progress | None = None, strict: bool = True,
) -> list[tuple[tuple[Sentence, ...], Report]]:
    """At most `pairs` distinct pairs about each context, in the order of `contexts`, and what became of the others.

    A later round asks only about contexts that still lack pairs and shows the author their questions; a local author is
    asked several times at once where they are few, and any other no more after IDLE rounds without a new pair.
    progress: called after each round with (pairs kept, pairs requested), both over all contexts.
    Raises TargetError where nothing usable was written about a context (strict; else its report says so in `nothing`),
    AuthorError when the author fails.
    """
    if pairs < 1 or rounds < 1:
        raise TargetError(f"{pairs} pairs in {rounds} rounds cannot be written: ask for at least one pair in one round")
    kept: list[list[Pair]] = [[] for _ in contexts]
    dropped: list[Counter[str]] = [Counter() for _ in contexts]
    asked, idle, wrote = [0] * len(contexts), [0] * len(contexts), [""] * len(contexts)
    local = isinstance(author, LocalAuthor)
    for turn in range(rounds):
        lacking = [i for i, found in enumerate(kept) if len(found) < pairs and (local or idle[i] < IDLE)]
        if not lacking:
            break
        n = pairs if turn == 0 else max(pairs - len(kept[i]) for i in lacking) + _SPARE
        times = max(1, TOGETHER // len(lacking)) if turn and local else 1
        order = [i for i in lacking for _ in range(times)]
        texts = author.write([contexts[i] for i in order], [tuple(kept[i]) for i in order], n)
        by_context: dict[int, list[Pair]] = {i: [] for i in lacking}
        for i, text in zip(order, texts, strict=True):
            new, reasons = keep_pairs(parse_pairs(text), kept[i] + by_context[i], context=contexts[i].text)
            by_context[i] += new
            dropped[i].update(reasons)
            wrote[i] = text
        found = list(by_context.values())
        for i in lacking:
            asked[i] += 1
        if isinstance(author, LocalAuthor) and author.checked:
            confirmed = _confirmed(author.lm, [contexts[i].text for i in lacking], found)
            for i, new, sure in zip(lacking, found, confirmed, strict=True):
                if len(sure) < len(new):
                    dropped[i]["answered otherwise"] += len(new) - len(sure)
            found = confirmed
        for i, new in zip(lacking, found, strict=True):
            idle[i] = 0 if new else idle[i] + 1
            kept[i] += _rarest(new, kept[i], pairs - len(kept[i]))
        if progress:
            progress(sum(map(len, kept)), pairs * len(contexts))
    about = zip(contexts, wrote, asked, dropped, strict=True)
    nothing = ["" if found else _nothing(*why) for found, why in zip(kept, about, strict=True)]
    if strict and any(nothing):
        raise TargetError(next(filter(None, nothing)))
    return [
        (tuple(Sentence(q, a, x.id) for q, a in found), Report(pairs, len(found), times, dict(lost), said))
        for x, found, times, lost, said in zip(contexts, kept, asked, dropped, nothing, strict=True)
    ]


def _rarest(new: Sequence[Pair], kept: Sequence[Pair], count: int) -> list[Pair]:
    """At most `count` of the new pairs: always the one whose answer has come up least, so that no fact is left out."""
    times = Counter(tuple(tokens(answer)) for _, answer in kept)
    left, chosen = list(new), list[Pair]()
    while left and len(chosen) < count:
        chosen.append(min(left, key=lambda pair: times[tuple(tokens(pair[1]))]))
        left.remove(chosen[-1])
        times[tuple(tokens(chosen[-1][1]))] += 1
    return chosen


def build_target_set(
    context: Context, author: Author, *, pairs: int = 15, unrelated: Sequence[Sentence] = (), rounds: int = ROUNDS
) -> TargetSet:
    """ℰ of one context: pairs by the author and the unrelated sentences given. Raises as write_pairs does."""
    ((related, _),) = write_pairs([context], author, pairs=pairs, rounds=rounds)
    return TargetSet(context, related, tuple(unrelated), author.id)


def _confirmed(lm: LM, texts: Sequence[str], found: Sequence[Sequence[Pair]]) -> list[list[Pair]]:
    """Of the pairs found in each text those whose question the model, reading the text, answers as written."""
    asked = [(i, pair) for i, pairs in enumerate(found) for pair in pairs]
    longest = max((len(lm.encode(answer)) for _, (_, answer) in asked), default=0)
    given = lm.answer([q for _, (q, _) in asked], [texts[i] for i, _ in asked], max_new_tokens=2 * longest + 8)
    sure: list[list[Pair]] = [[] for _ in texts]
    for (i, pair), answer in zip(asked, given, strict=True):
        if _agree(pair[1], answer):
            sure[i].append(pair)
    return sure


def _agree(one: str, other: str) -> bool:
    """Whether two answers say the same: one has all words of the other, or most words are in both.

    In scripts without spaces: one stands in the other, or most letters are in both.
    """
    if UNSPACED.search(one + other):
        first, second = ("".join(plain(text).split()) for text in (one, other))
        within = bool(first and second) and (first in second or second in first)
        return within or qa_f1(" ".join(first), [" ".join(second)]) > 0.5
    words, others = tokens(one), tokens(other)
    if not words or not others:
        return words == others
    return set(words) <= set(others) or set(others) <= set(words) or qa_f1(one, [other]) > 0.5


def _nothing(context: Context, text: str, rounds: int, dropped: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "no pair in it"
    beginning = " ".join(text.split())[:120]
    return (f"nothing usable was written about '{context.title or context.id}' in {rounds} rounds ({reasons}); "
            f"the author wrote: '{beginning}': choose another author or prompt")
