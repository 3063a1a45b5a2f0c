"""Recall of recommended titles: by hand, against brute force, and against the released run on INSPIRED."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from selfparam.data.conversations import read_entities
from selfparam.data.files import json_lines
from selfparam.metrics.recall import (
    FILTERS,
    GROUPS,
    KS,
    Match,
    Recall,
    Row,
    entity_name,
    hit_list,
    mcnemar,
    nearest,
    outcomes,
    parse,
    recall,
    rows_of,
    shares,
)

INSPIRED = Path(__file__).resolve().parents[2] / "shared" / "data" / "convrec" / "inspired"
needs_inspired = pytest.mark.skipif(not INSPIRED.is_dir(), reason=f"needs the INSPIRED files in {INSPIRED}")


# --- text -> titles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "titles"), [
    ("1. Alien\n2. Heat", ["Alien", "Heat"]),
    ("Here are 20:\n\n1. Alien (1979)\n2) Heat - a film\n3 - Up\n\n", ["Alien", "Heat - a film", "Up", "", ""]),
    ("1.Alien (a (nested) remark)\n12.  The   Thing ", ["Alien (a remark)", "The Thing"]),
    ("Alien, Heat\nUp", ["Alien", " Heat".strip(), "Up"]),
    ("I liked 1. very much\n1. Alien", ["very much", "Alien"]),  # a "1." before the list cuts there
    ("2. Heat\n3. Up", ["Heat", "Up"]),
    ("", [""]),
    ("1. 2001: A Space Odyssey\n2. 21 Jump Street", [": A Space Odyssey", "21 Jump Street"]),
    ("5 \u2014 Alien", ["Alien"]),
])
def test_parse(text: str, titles: list[str]) -> None:
    assert parse(text) == titles


clean = st.text(st.sampled_from("abcXYZ éü'&!?:"), min_size=1, max_size=12).map(lambda t: " ".join(t.split()))
forms = st.sampled_from(["{n}. {t}", "{n}) {t}", " {n} - {t} (1999)", "{n}.{t}"])


@settings(deadline=None)
@given(st.lists(clean.filter(bool), min_size=1, max_size=25), forms, st.text(st.sampled_from("aB \n,:2("), max_size=30))
def test_parse_gives_back_any_numbered_list(titles: list[str], form: str, before: str) -> None:
    lines = [form.format(n=n, t=t) for n, t in enumerate(titles, 1)]
    lines[0] = f"1. {titles[0]}"
    assert parse(before + "\n".join(lines)) == titles


@settings(deadline=None)
@given(st.text(st.sampled_from("1.2)(-, \n\tAé\u2003")))
def test_parse_takes_any_text(text: str) -> None:
    titles = parse(text)
    assert titles and all("\n" not in t and t.rstrip() == t for t in titles)


@pytest.mark.parametrize(("key", "name"), [
    ("<http://dbpedia.org/resource/Hoffa_(film)>", "Hoffa"),
    ("<http://dbpedia.org/resource/X-Men:_First_Class>", "X Men: First Class"),
    ("Police Academy (1984)", "Police Academy"),
    ("<http://dbpedia.org/resource/Ann_Lee_(producer)__PersonFunction__1>", "Ann Lee PersonFunction 1"),
])
def test_entity_name(key: str, name: str) -> None:
    assert entity_name(key) == name


# --- titles -> names -------------------------------------------------------------------------------------------------


def test_nearest_ignores_case_and_orders_ties_by_code_point() -> None:
    found = nearest(["ALIEN", "Alien3", "Hat"], ["Heat", "alien", "Alien", "Chat", "That"])
    assert found["ALIEN"] == Match("ALIEN", 0, ("Alien", "alien"))
    assert found["Alien3"] == Match("Alien3", 1, ("Alien", "alien"))
    assert found["Hat"] == Match("Hat", 1, ("Chat", "Heat", "That"))


def test_nearest_of_a_text_without_end() -> None:
    text = "x" * 70_000
    assert nearest([text], ["Alien", "Heat!!"])[text] == Match(text, 70_000, ("Alien", "Heat!!"))


def test_nearest_needs_names() -> None:
    with pytest.raises(ValueError, match="no names"):
        nearest(["Alien"], [])


words = st.text(st.sampled_from("abB é"), max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(words, max_size=6), st.lists(words, min_size=1, max_size=8))
def test_nearest_equals_the_plain_loop(titles: list[str], names: list[str]) -> None:
    found = nearest(titles, names)
    for title in titles:
        distances = {name: Levenshtein.distance(title.lower(), name.lower()) for name in names}
        least = min(distances.values())
        assert found[title] == Match(title, least, tuple(sorted(n for n, d in distances.items() if d == least)))


# --- names -> hits ---------------------------------------------------------------------------------------------------


def match(*names: str, distance: int = 0) -> Match:
    return Match(names[0] if names else "", distance, names)


def test_the_four_filters_by_hand() -> None:
    ranked = (match("Seen"), match("Far", distance=9), match("Seen", distance=1), match("New"), match("Old"))
    row = Row(("New", "Old", "Far"), frozenset({"Seen", "Old"}), ranked)
    found = recall([row])
    assert found.targets == {"all": 3, "recommendation": 2, "discussion": 1}
    assert found.hits["r1"] == {"all": (0, 3, 3, 3), "recommendation": (0, 2, 2, 2), "discussion": (0, 1, 1, 1)}
    assert found.hits["r2"] == {"all": (1, 2, 2, 2), "recommendation": (1, 2, 2, 2), "discussion": (0, 0, 0, 0)}
    assert found.hits["r3"] == {"all": (0, 2, 2, 2), "recommendation": (0, 1, 1, 1), "discussion": (0, 1, 1, 1)}
    assert found.hits["r4"] == {"all": (1, 1, 1, 1), "recommendation": (1, 1, 1, 1), "discussion": (0, 0, 0, 0)}
    assert found.low == found.hits == found.high
    assert found.at("r2", "recommendation", 1) == 0.5
    assert hit_list([row], "r2", 1) == [False, False, True]


def test_only_the_first_k_count() -> None:
    ranked = tuple(match(f"Film {i}") for i in range(30))
    rows = [Row((f"Film {i}",), frozenset(), ranked) for i in (0, 1, 4, 5, 9, 10, 19, 20)]
    assert recall(rows).hits["r1"]["all"] == (1, 3, 5, 7)


def test_no_target_of_a_group_is_no_recall() -> None:
    found = recall([Row(("New",), frozenset(), (match("New"),))])
    assert found.at("r1", "discussion", 1) is None and found.at("r1", "all", 1) == 1.0


def test_two_targets_of_one_name_are_two_hits() -> None:
    assert recall([Row(("Heat", "Heat"), frozenset(), (match("Heat"),))]).hits["r1"]["all"] == (2, 2, 2, 2)


def test_ties_take_the_first_name_and_are_bounded() -> None:
    found = recall([Row(("B",), frozenset(), (match("A", "B", distance=3),))])
    assert (found.hits["r1"]["all"][0], found.low["r1"]["all"][0], found.high["r1"]["all"][0]) == (0, 0, 1)
    assert found.high["r3"]["all"][0] == 0


def plain(row: Row, chosen: Any, names: tuple[str, ...]) -> tuple[frozenset[int], ...]:
    """Which targets are hit at each K with one name for each title: lists and slices, as the rules say it."""
    near_only, unseen_only = FILTERS[chosen]
    left = [n for n, m in zip(names, row.ranked, strict=True)
            if not (near_only and m.distance > 2) and not (unseen_only and n in row.seen)]
    return tuple(frozenset(i for i, t in enumerate(row.targets) if t in left[:k]) for k in KS)


some = st.sampled_from("ABCDE")
matches = st.builds(lambda names, d: Match("t", d, tuple(sorted(names))), st.sets(some, min_size=1, max_size=3),
                    st.integers(0, 4))
rows = st.builds(Row, st.lists(some, min_size=1, max_size=3).map(tuple), st.frozensets(some, max_size=3),
                 st.lists(matches, max_size=7).map(tuple))


@settings(max_examples=100, deadline=None)
@given(rows)
def test_outcomes_are_those_of_every_choice(row: Row) -> None:
    def bits(hit: frozenset[int]) -> int:
        return sum(1 << i for i in hit)

    for chosen in FILTERS:
        every = [plain(row, chosen, names) for names in itertools.product(*(m.names for m in row.ranked))]
        first = plain(row, chosen, tuple(m.names[0] for m in row.ranked))
        for k in range(len(KS)):
            assert outcomes(row, chosen, ties=True)[k] == {bits(one[k]) for one in every}
            assert outcomes(row, chosen)[k] == {bits(first[k])}


# --- what recall hides, and two runs ---------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    texts = ["1. Alien\n2. alien\n3. Nothing of the kind\n", "Heat, Sigourney Weaver"]
    made = rows_of(texts, [["Alien"], ["Heat"]], [[], ["Heat"]], ["Alien", "Heat", "Sigourney Weaver"])
    found = shares(texts, made, frozenset({"Alien", "Heat"}))
    assert (found.lists, found.titles, found.out_of_vocabulary) == (1 / 2, 5 / 40, 1 / 5)
    assert (found.repeated, found.seen, found.not_items, found.tied) == (1 / 5, 1 / 4, 1 / 4, 0.0)
    assert shares(texts, made).not_items is None
    assert shares([], []).lists is None


@pytest.mark.parametrize(("only_first", "only_second", "p"), [
    (0, 0, 1.0), (5, 1, 2 * 7 / 64), (1, 5, 2 * 7 / 64), (3, 3, 1.0), (2, 0, 0.5), (10, 0, 2 / 1024),
])
def test_mcnemar(only_first: int, only_second: int, p: float) -> None:
    first = [True] * only_first + [False] * only_second + [True, False, True]
    second = [False] * only_first + [True] * only_second + [True, False, True]
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second, found.p) == (only_first, only_second, pytest.approx(p))


def test_mcnemar_stays_exact_for_thousands() -> None:
    assert 0 < mcnemar([True] * 2600 + [False] * 2000, [False] * 2600 + [True] * 2000).p < 1e-17


def test_mcnemar_refuses_runs_of_different_tests() -> None:
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True, False], [True])


# --- the released run ------------------------------------------------------------------------------------------------


def lines(name: str) -> list[dict[str, Any]]:
    return [row for row, _ in json_lines(INSPIRED / name)]


@cache
def released() -> tuple[list[str], list[Row], list[Row], dict[str, Any]]:
    """The texts, rows as we match them, rows with the released choices among ties, and the expected numbers."""
    names = {i: entity_name(key) for i, key in read_entities(INSPIRED / "entity2id.json.gz").items()}
    texts = [one["text"] for one in lines("mistral_base_outputs.jsonl.gz")]
    test = lines("test.jsonl.gz")
    ours = rows_of(texts, [[names[i] for i in row["rec"]] for row in test],
                   [[names[i] for i in row["prev_entity"]] for row in test], names.values())
    theirs = [Row(tuple(one["targets"]), frozenset(one["seen"]), tuple(Match(t, d, (n,)) for t, d, n in one["ranked"]))
              for one in lines("mistral_base_ranked.jsonl.gz")]
    return texts, ours, theirs, json.loads((INSPIRED / "mistral_base_expected.json").read_text("utf-8"))


@needs_inspired
def test_titles_distances_and_names_are_those_of_the_release() -> None:
    _, ours, theirs, _ = released()
    for row, other in zip(ours, theirs, strict=True):
        assert (row.targets, row.seen) == (other.targets, other.seen)
        assert [(m.title, m.distance) for m in row.ranked] == [(m.title, m.distance) for m in other.ranked]
        assert all(o.names[0] in m.names for m, o in zip(row.ranked, other.ranked, strict=True))


def hits(found: Recall, which: str = "hits") -> dict[str, dict[str, list[int]]]:
    return {chosen: {group: list(getattr(found, which)[chosen][group]) for group in GROUPS} for chosen in FILTERS}


@needs_inspired
def test_hits_are_the_expected_ones() -> None:
    _, ours, theirs, expected = released()
    found = recall(ours)
    assert found.targets == expected["n_targets"]
    assert hits(found) == expected["hits_with_lexicographic_ties"]
    bounds = expected["hit_bounds_over_all_tie_choices_all"]
    assert {c: found.low[c]["all"] for c in FILTERS} == {c: tuple(bounds[c]["min"]) for c in FILTERS}
    assert {c: found.high[c]["all"] for c in FILTERS} == {c: tuple(bounds[c]["max"]) for c in FILTERS}
    chosen = recall(theirs)
    assert hits(chosen) == expected["hits_with_released_ties"]
    for one, group, k in itertools.product(FILTERS, GROUPS, KS):
        assert chosen.at(one, group, k) == pytest.approx(expected["released"][one][group][f"recall@{k}"], abs=1e-12)
    assert {c: round(chosen.at(c, "all", 1) or 0, 4) for c in FILTERS} == expected["paper_table3_recall@1"]


@needs_inspired
def test_shares_of_the_released_run() -> None:
    texts, ours, _, _ = released()
    found = shares(texts, ours)
    assert found.lists == 223 / 228
    assert found.out_of_vocabulary is not None and round(found.out_of_vocabulary, 3) == 0.598
