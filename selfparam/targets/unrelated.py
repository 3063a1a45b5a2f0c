"""Unrelated sentences: what keeps the model as it was, and keeps a new fact from leaking to other subjects.

Sources: the model's own samples (no data needed, the default), any text file of the user's, the packaged sample, or
SlimPajama as in the paper (section 3.2, streamed from the hub). Neighbours are the questions of the target set asked
about other, made-up subjects, with the model's own answers. Refuses to know training.
"""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from selfparam.data.slots import Slots
from selfparam.errors import TargetError
from selfparam.lm import LM
from selfparam.own import LONGEST, answered, sampled
from selfparam.types import Sentence, TargetSet

SLIMPAJAMA = "cerebras/SlimPajama-627B"
POOL = 5_000  # passages that are read of it at a time
RATIO, NEIGHBOUR_SHARE = 4.0, 0.9  # measured on the embedded model (docs/LOG.md): with fewer a new fact leaks
_LETTERS = "".join(map(chr, range(0x250)))  # Latin ones: other alphabets have no made-up names here
_UPPER, _LOWER = ("[" + "".join(filter(kind, _LETTERS)) + "]" for kind in (str.isupper, str.islower))
_NAME = re.compile(rf"{_UPPER}[\w'’-]*(?: (?:of |the )?{_UPPER}[\w'’-]*)*")
_OF = re.compile(r"['’]s?$")  # Bellmere's


def packaged(part: Literal["train", "held-out"] = "train") -> list[str]:
    """Plain English passages that ship with the package; the held-out half measures drift and is never trained on."""
    lines = resources.files("selfparam.data").joinpath("passages.txt").read_text("utf-8").splitlines()
    return lines[0::2] if part == "train" else lines[1::2]


def passages_of(text: str) -> list[str]:
    """Passages of one or a few sentences, about LONGEST characters, from a longer text; of less than 40 none."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n", text):
        kept = ""
        for sentence in re.findall(r"[^.!?。！？]+[.!?。！？]+[\"'”’)」』]*\s*|[^.!?。！？]+$", paragraph.strip()):
            if kept and len(kept) + len(sentence) > LONGEST:
                found.append(kept.strip())
                kept = ""
            kept += sentence
        found.append(kept.strip())
    parts = [part for p in found for part in (textwrap.wrap(p, LONGEST) if len(p) > 2 * LONGEST else [p])]
    return [part for part in parts if len(part) >= 40]


def from_file(path: str | Path) -> list[str]:
    """Passages of the user's own text file. Raises TargetError when there are none."""
    try:
        found = passages_of(Path(path).read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"cannot read unrelated text from '{path}' ({error}): give a UTF-8 text file") from error
    if not found:
        raise TargetError(f"no sentences in '{path}': give a text file with at least a paragraph of prose")
    return found


def slimpajama(n: int, seed: int = 0, contexts: Sequence[str] = ()) -> list[str]:
    """n passages of SlimPajama (needs the network), others for another seed and other contexts (ids).

    They are drawn from one pool that the process reads once. Raises TargetError.
    """
    pool = slimpajama_pool(-(-n // POOL) * POOL) if n else ()
    return random.Random("/".join((str(seed), *contexts))).sample(pool, min(n, len(pool)))


@cache
def slimpajama_pool(n: int) -> tuple[str, ...]:
    """The first n passages of the stream in a shuffled order, always the same. Raises TargetError."""
    try:
        from datasets import load_dataset

        rows = load_dataset(SLIMPAJAMA, split="train", streaming=True).shuffle(seed=0, buffer_size=1000)
        found: list[str] = []
        for row in rows:
            found += passages_of(row["text"])[:3]
            if len(found) >= n:
                break
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise TargetError(f"cannot stream {SLIMPAJAMA} ({reason}): give a text file or 'self' as source") from error
    return tuple(found[:n])


def swap_names(question: str, context: str, slots: Slots, owners: bool = False) -> str | None:
    """The question about another subject: names that also stand in the context are replaced by made-up ones.

    A capitalised common noun that the context also has in lower case ("Festival") stays. Of a name that the context has
    not, the last words that it has count. owners: "Bellmere's" is Bellmere, too. None without any name.
    """
    words = set(re.findall(rf"\b{_LOWER}[\w-]+", context))

    def other(match: re.Match[str]) -> str:
        first, name = "", match.group(0)
        ending = "".join(_OF.findall(name)) if owners and name not in context else ""
        name = name.removesuffix(ending)
        while name and (name[0].islower() or name not in context):  # "Does Bellmere", "Mayor of Bellmere"
            word, space, name = name.partition(" ")
            first += word + space
        alone = not first and match.start() == 0 and " " not in name
        if not name or (alone and name.lower() in words | {"the", "a"}):
            return match.group(0)
        return first + another(name) + ending

    def another(name: str) -> str:
        parts = name.split()
        if slots.rng.random() < 0.6:  # a name of the same shape: hard to tell apart by its kind
            return " ".join(p if p.lower() in words or not p[0].isupper() else _alike(p, slots) for p in parts)
        if len(parts) > 1 and parts[-1].lower() in words:
            return f"{slots.draw('place')} {parts[-1]}"
        return slots.draw(
            slots.rng.choice(("person", "org", "title")) if len(parts) > 1 else slots.rng.choice(("place", "product"))
        )

    swapped = _NAME.sub(other, question)
    return swapped if swapped != question else None


def _alike(word: str, slots: Slots) -> str:
    """A made-up word with the same ending: another name of the same kind, most likely."""
    stem = slots.draw("place").split()[-1]
    return stem[: max(2, len(stem) // 2)] + word[max(1, len(word) - slots.rng.randint(2, 4)) :]


def neighbours(lm: LM, target_set: TargetSet, n: int, *, seed: int = 0) -> list[Sentence]:
    """Up to n of the set's questions asked about other subjects, answered by the model as it is.

    Questions that name their subject only as an owner ("Bellmere's") are asked where the others give too few.
    """
    rng = random.Random(f"{seed}/{target_set.context.id}")
    slots = Slots(rng)
    questions = [s.prompt for s in target_set.related if s.prompt]
    swapped: list[str] = []
    for owners in (False, True):
        named = set()
        for question in _forever(rng, questions if len(swapped) < n else []):
            found = swap_names(question, target_set.context.text, slots, owners)
            if found:
                named.add(question)
                swapped.append(found)
            if len(swapped) >= n:
                break
        questions = [question for question in questions if question not in named]
    return answered(lm, swapped, seed=seed)


def _forever(rng: random.Random, items: list[str], rounds: int = 8) -> Iterator[str]:
    for _ in range(rounds if items else 0):
        yield from rng.sample(items, len(items))


def add_unrelated(
    lm: LM,
    sets: Sequence[TargetSet],
    *,
    ratio: float = RATIO,
    neighbour_share: float = NEIGHBOUR_SHARE,
    source: str = "self",
    seed: int = 0,
) -> list[TargetSet]:
    """The same sets with `ratio` unrelated sentences for each related one, `neighbour_share` of them neighbours.

    source: "self" (the model's own samples), "packaged", "slimpajama", or a text file. Raises TargetError.
    """
    wanted = [round(ratio * len(s.related)) for s in sets]
    near = [neighbours(lm, s, round(w * neighbour_share), seed=seed) for s, w in zip(sets, wanted, strict=True)]
    missing = sum(max(0, w - len(x)) for w, x in zip(wanted, near, strict=True))
    rng = random.Random(seed)
    if source == "self":
        pool = sampled(lm, missing, seed=seed)
    else:
        texts = (
            packaged()
            if source == "packaged"
            else slimpajama(missing, seed, [s.context.id for s in sets])
            if source == "slimpajama"
            else from_file(source)
        )
        pool = [Sentence("", t) for t in rng.sample(texts, min(missing, len(texts)))]
    found = []
    for item, count, close in zip(sets, wanted, near, strict=True):
        take = max(0, count - len(close))
        found.append(replace(item, unrelated=(*close, *pool[:take])))
        pool = pool[take:]
    return found
