"""Recall@K of recommended titles: text -> titles -> nearest entity names -> hits, as the paper's Table 3 counts them.

What the released program leaves to chance, the choice among equally near names, is fixed here (the first in code-point
order) and bounded (the fewest and most hits that any choice gives). What it hides is counted beside it. Refuses to know
files and models. Source: SELF-PARAM, arXiv 2410.00487, 4.4 and A.1.1, which takes the metric of He et al. (CIKM 2023,
arXiv 2308.10053); its rules are written down in docs/recommendation.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

Group = Literal["all", "recommendation", "discussion"]
Filter = Literal["r1", "r2", "r3", "r4"]

KS = (1, 5, 10, 20)
ASKED = 20  # titles that the prompt asks for
NEAR = 2  # edits that a title may be away from a name to count as that name
#: all targets; those not mentioned earlier in the conversation; those mentioned earlier
GROUPS: tuple[Group, ...] = ("all", "recommendation", "discussion")
#: (titles farther than NEAR from every name go, names mentioned earlier go)
FILTERS: dict[Filter, tuple[bool, bool]] = {
    "r1": (False, False), "r2": (False, True), "r3": (True, False), "r4": (True, True),
}

_PARENTHESES = re.compile(r"\([^()]*\)")
_NUMBER = re.compile(r"^\d+[.)、]?\s*[-–—]?\s*")
_AT_ONCE = 512  # titles whose distances to all names are in memory at the same time


@dataclass(frozen=True)
class Match:
    """A title, its edit distance to the nearest names, and all names at that distance; the first one is taken."""

    title: str
    distance: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One turn to be filled: the names to hit, the names mentioned before, and what was recommended, best first."""

    targets: tuple[str, ...]
    seen: frozenset[str]
    ranked: tuple[Match, ...]

    def group(self, group: Group) -> int:
        """The targets of a group as bits: bit i is target i."""
        bits = sum(1 << i for i, name in enumerate(self.targets) if name in self.seen)
        return {"all": (1 << len(self.targets)) - 1, "discussion": bits,
                "recommendation": (1 << len(self.targets)) - 1 - bits}[group]


@dataclass(frozen=True)
class Recall:
    """Hits by filter and group at each of KS. low and high: the fewest and most that any choice among ties gives."""

    targets: dict[Group, int]
    hits: dict[Filter, dict[Group, tuple[int, ...]]]
    low: dict[Filter, dict[Group, tuple[int, ...]]]
    high: dict[Filter, dict[Group, tuple[int, ...]]]

    def at(self, chosen: Filter, group: Group, k: int) -> float | None:
        """Recall@k in [0, 1]; None where the group has no targets."""
        n = self.targets[group]
        return self.hits[chosen][group][KS.index(k)] / n if n else None


# --- text -> titles --------------------------------------------------------------------------------------------------


def has_list(text: str) -> bool:
    """Whether there is a "1." for the list to begin at; without one the commas of the whole text divide it."""
    return "1." in text


def parse(text: str) -> list[str]:
    """The titles of a generated text, in its order; empty lines stay as empty titles.

    Everything after the first "1." (without one: the whole text, commas as line breaks), a title a line, without
    (remarks in parentheses) and a leading number with its dot, bracket or dash.
    """
    listed = text.split("1.", 1)[1] if has_list(text) else text.replace(",", "\n")
    return [_NUMBER.sub("", _squeeze(_PARENTHESES.sub("", line))) for line in listed.split("\n")]


def entity_name(key: str) -> str:
    """How an entity is called: "<http://dbpedia.org/resource/Raising_Arizona_(film)>" -> "Raising Arizona"."""
    return _squeeze(_PARENTHESES.sub("", re.sub("[_>-]", " ", key.rsplit("/", 1)[-1])))


def _squeeze(text: str) -> str:
    return " ".join(text.split())


# --- titles -> names -------------------------------------------------------------------------------------------------


def nearest(titles: Iterable[str], names: Iterable[str]) -> dict[str, Match]:
    """The nearest names of every distinct title, by Levenshtein distance between lower-cased texts.

    Exact names are looked up, the rest is measured in blocks of [names, titles] distances. Raises ValueError without
    names.
    """
    by_lower: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        by_lower.setdefault(name.lower(), []).append(name)
    if not by_lower:
        raise ValueError("no names to match titles with: give at least one")
    lower = sorted(by_lower, key=len)  # names of one length are measured side by side
    found: dict[str, Match] = {}
    rest: dict[str, list[str]] = {}
    for title in dict.fromkeys(titles):
        key = title.lower()
        if key in by_lower:
            found[title] = Match(title, 0, tuple(by_lower[key]))
        else:
            rest.setdefault(key, []).append(title)
    keys = sorted(rest, key=len)
    width = np.uint16 if max(map(len, (*keys[-1:], lower[-1]))) < 1 << 16 else np.int32  # no distance is longer
    for at in range(0, len(keys), _AT_ONCE):
        part = keys[at : at + _AT_ONCE]
        distances = process.cdist(lower, part, scorer=Levenshtein.distance, dtype=width, workers=-1)
        least = distances.min(axis=0)
        for j, key in enumerate(part):
            near = sorted(n for i in np.flatnonzero(distances[:, j] == least[j]) for n in by_lower[lower[i]])
            for title in rest[key]:
                found[title] = Match(title, int(least[j]), tuple(near))
    return found


def rows_of(texts: Sequence[str], targets: Sequence[Sequence[str]], seen: Sequence[Iterable[str]],
            names: Iterable[str]) -> list[Row]:
    """Rows from generated texts, the names to hit and those mentioned before, row by row. names: of all entities."""
    titles = [parse(text) for text in texts]
    near = nearest((title for one in titles for title in one), names)
    return [Row(tuple(hit), frozenset(before), tuple(near[title] for title in one))
            for one, hit, before in zip(titles, targets, seen, strict=True)]


# --- names -> hits ---------------------------------------------------------------------------------------------------


def outcomes(row: Row, chosen: Filter, *, ties: bool = False) -> tuple[frozenset[int], ...]:
    """For each of KS the sets of targets (as bits) that are among the first K names left after the filter.

    One set each with the first of equally near names; with `ties`, the sets of every choice, title by title.
    """
    near_only, unseen_only = FILTERS[chosen]
    bits: dict[str, int] = {}
    for i, name in enumerate(row.targets):
        bits[name] = bits.get(name, 0) | 1 << i
    states = {(0, 0)}  # (names kept so far, targets among them)
    ended: list[set[int]] = [set() for _ in KS]
    for match in row.ranked:
        if near_only and match.distance > NEAR:
            continue
        options = {None if unseen_only and name in row.seen else bits.get(name, 0)
                   for name in (match.names if ties else match.names[:1])}
        after = set()
        for kept, hit in states:
            for option in options:
                if option is None:
                    after.add((kept, hit))
                    continue
                after.add((kept + 1, hit | option))
                if kept + 1 in KS:
                    ended[KS.index(kept + 1)].add(hit | option)
        states = {state for state in after if state[0] < KS[-1]}
        if not states:
            break
    for i, k in enumerate(KS):
        ended[i] |= {hit for kept, hit in states if kept < k}
    return tuple(frozenset(sets) for sets in ended)


def recall(rows: Sequence[Row]) -> Recall:
    """Count the hits over all targets of all rows; every target weighs the same."""
    targets: dict[Group, int] = {g: sum(row.group(g).bit_count() for row in rows) for g in GROUPS}
    hits: dict[Filter, dict[Group, tuple[int, ...]]] = {}
    low: dict[Filter, dict[Group, tuple[int, ...]]] = {}
    high: dict[Filter, dict[Group, tuple[int, ...]]] = {}
    for chosen in FILTERS:
        sums = {g: np.zeros((3, len(KS)), dtype=int) for g in GROUPS}
        for row in rows:
            first = outcomes(row, chosen)
            every = outcomes(row, chosen, ties=True) if any(len(m.names) > 1 for m in row.ranked) else first
            for g in GROUPS:
                taken = [_count(sets, row.group(g)) for sets in first]
                counts = [_count(sets, row.group(g)) for sets in every]
                sums[g] += [[min(c) for c in taken], [min(c) for c in counts], [max(c) for c in counts]]
        hits[chosen], low[chosen], high[chosen] = (
            {g: tuple(map(int, sums[g][i])) for g in GROUPS} for i in range(3)
        )
    return Recall(targets, hits, low, high)


def _count(sets: Iterable[int], group: int) -> list[int]:
    """How many targets of the group each of the sets (bits) holds."""
    return [(bits & group).bit_count() for bits in sets]


# --- what recall hides -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """What the titles are, as shares in [0, 1]; None where there is nothing to divide by.

    lists              outputs with a numbered list
    titles             titles of the 20 asked for, mean over outputs (more than 20 count as 20)
    out_of_vocabulary  titles more than NEAR edits away from every entity name
    repeated           titles that stand earlier in the same output
    seen               titles in the vocabulary that were mentioned earlier in the conversation
    not_items          titles in the vocabulary that are no item (None without a list of items)
    tied               titles with several nearest names
    """

    lists: float | None
    titles: float | None
    out_of_vocabulary: float | None
    repeated: float | None
    seen: float | None
    not_items: float | None
    tied: float | None


def shares(texts: Sequence[str], rows: Sequence[Row], items: frozenset[str] | None = None) -> Shares:
    """Of the generated texts and their rows. items: the names that may be recommended."""
    given = [(row, [m for m in row.ranked if m.title]) for row in rows]
    titles = [(row, m) for row, matches in given for m in matches]
    known = [(row, m) for row, m in titles if m.distance <= NEAR]
    repeated = sum(len(matches) - len({m.title.lower() for m in matches}) for _, matches in given)
    return Shares(
        _share(sum(map(has_list, texts)), len(texts)),
        _share(sum(min(ASKED, len(matches)) for _, matches in given), ASKED * len(rows)),
        _share(len(titles) - len(known), len(titles)),
        _share(repeated, len(titles)),
        _share(sum(m.names[0] in row.seen for row, m in known), len(known)),
        None if items is None else _share(sum(m.names[0] not in items for _, m in known), len(known)),
        _share(sum(len(m.names) > 1 for _, m in titles), len(titles)),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# --- two runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Targets that only one of two runs hits, and the probability of a split at least as uneven by chance."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """The exact two-sided McNemar test: of the targets that one run hits and the other misses, is it half and half?

    p = min(1, 2 · Σ_{i ≤ min(b, c)} C(b+c, i) / 2^(b+c)). Raises ValueError where the runs differ in length.
    """
    pairs = list(zip(first, second, strict=True))
    b, c = sum(a and not z for a, z in pairs), sum(z and not a for a, z in pairs)
    tail = term = 1  # term = C(b+c, i)
    for i in range(min(b, c)):
        term = term * (b + c - i) // (i + 1)
        tail += term
    return Paired(b, c, min(1.0, 2 * tail / 2 ** (b + c)))


def hit_list(rows: Sequence[Row], chosen: Filter, k: int) -> list[bool]:
    """For every target of every row, whether it is a hit at k (what mcnemar takes)."""
    found = []
    for row in rows:
        [bits] = outcomes(row, chosen)[KS.index(k)]
        found += [bool(bits >> i & 1) for i in range(len(row.targets))]
    return found
