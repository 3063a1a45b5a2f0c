"""selfparam score recommendations: recall of anybody's generated recommendations, counted as the paper counts it.

Says what it left out and goes on with the rest. Refuses to know how anything is computed.
Source: SELF-PARAM, arXiv 2410.00487, 4.4 and A.1.1; the rules are in docs/recommendation.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from selfparam.report import Journal, output, plain

if TYPE_CHECKING:
    from selfparam.data.conversations import Request
    from selfparam.metrics.recall import Paired, Recall, Row, Shares

score = typer.Typer(help="Score what a model wrote.")

_OUTPUTS_HELP = 'Generated texts: .jsonl of {"index": row of the test, from 0, "text": ...}.'
_FILTERS = {"r1": "as they are", "r2": "without seen", "r3": "in vocabulary", "r4": "both"}
_SHARES = {
    "lists": "outputs with a numbered list", "titles": "titles of the 20 asked for",
    "out_of_vocabulary": "titles that are no entity", "repeated": "titles repeated in one output",
    "seen": "entities mentioned before", "not_items": "entities that are no item",
    "tied": "titles with several nearest names",
}


@score.callback()
def _commands() -> None:
    """Keeps `recommendations` a command of its own."""


@score.command()
def recommendations(
    test: Annotated[str, typer.Option(help="Test rows: test.jsonl (.gz) with input, rec and prev_entity.")],
    outputs: Annotated[str, typer.Option(help=_OUTPUTS_HELP)],
    entities: Annotated[str, typer.Option(help="All entities: entity2id.json (.gz).")],
    items: Annotated[str | None, typer.Option(
        help="The ids that may be recommended: item_ids.json; only the share of other titles needs it.")] = None,
    against: Annotated[str | None, typer.Option(
        help="Outputs of another run of the same test, for a paired comparison (McNemar).")] = None,
    machine: Annotated[bool, typer.Option("--json", help="Print JSON for machines and nothing else.")] = False,
) -> None:
    """Recall@1, 5, 10 and 20 of recommended titles, with the bounds that ties leave and what recall hides.

    Example: selfparam score recommendations --test test.jsonl --outputs outputs.jsonl --entities entity2id.json
    """
    journal = Journal(machine)
    from selfparam.data.conversations import read_entities, read_items, read_outputs, read_requests
    from selfparam.metrics.recall import KS, entity_name, has_list, recall, shares

    keys = read_entities(entities)
    names = {i: entity_name(key) for i, key in keys.items()}
    rows = read_requests(test, keys)
    allowed = None if items is None else frozenset(names[i] for i in read_items(items) if i in names)
    texts, notices = read_outputs(outputs, len(rows))
    bare = [i for i, text in texts.items() if not has_list(text)]
    if bare:
        notices.append(f"{Path(outputs).name}: {len(bare)} outputs hold no numbered list (no '1.'; index {bare[0]}"
                       f"{', …' if len(bare) > 1 else ''}): their commas and line breaks divide them")
    others: dict[int, str] = {}
    if against is not None:
        others, more = read_outputs(against, len(rows))
        notices += more
    for notice in notices:
        journal.note(notice)
    with journal.step("matching titles"):
        matched = _matched(rows, texts, names)
        second = _matched(rows, others, names)
    counted = [matched[i] for i in sorted(matched)]
    result, hidden = recall(counted), shares([texts[i] for i in sorted(texts)], counted, allowed)
    both = sorted(matched.keys() & second.keys())
    compared = _compared([matched[i] for i in both], [second[i] for i in both]) if both else {}
    if machine:
        found: dict[str, Any] = {
            "rows": len(rows), "scored": len(counted), "ks": KS, "targets": result.targets, "recall": _means(result),
            "hits": result.hits, "hits_low": result.low, "hits_high": result.high, "shares": asdict(hidden),
            "notes": journal.notes,
        }
        if against is not None:
            found["against"] = {"outputs": against, "rows": len(both), "pairs": {
                chosen: [asdict(pair) for pair in pairs] for chosen, pairs in compared.items()}}
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    _print(result, hidden, compared, against, len(counted), len(rows))


def _matched(rows: Sequence[Request], texts: dict[int, str], names: dict[int, str]) -> dict[int, Row]:
    """What was recommended for each row that has a text."""
    from selfparam.metrics.recall import rows_of

    chosen = sorted(texts)
    made = rows_of([texts[i] for i in chosen], [[names[t] for t in rows[i].targets] for i in chosen],
                   [[names[t] for t in rows[i].seen] for i in chosen], names.values())
    return dict(zip(chosen, made, strict=True))


def _compared(first: Sequence[Row], second: Sequence[Row]) -> dict[str, list[Paired]]:
    """For each filter, the two runs at each K, over all targets."""
    from selfparam.metrics.recall import FILTERS, KS, hit_list, mcnemar

    return {chosen: [mcnemar(hit_list(first, chosen, k), hit_list(second, chosen, k)) for k in KS]
            for chosen in FILTERS}


def _means(result: Recall) -> dict[str, dict[str, list[float | None]]]:
    from selfparam.metrics.recall import FILTERS, GROUPS, KS

    return {chosen: {group: [result.at(chosen, group, k) for k in KS] for group in GROUPS} for chosen in FILTERS}


def _print(result: Recall, hidden: Shares, compared: dict[str, list[Paired]], against: str | None, counted: int,
           rows: int) -> None:
    from selfparam.metrics.recall import FILTERS, GROUPS, KS

    console = output()
    table = Table("filter", "targets", "n", *(f"recall@{k}" for k in KS))
    for group in GROUPS:
        n = result.targets[group]
        for chosen in FILTERS:
            bounds = zip(*(found[chosen][group] for found in (result.hits, result.low, result.high)), strict=True)
            cells = ["-" if not n else f"{hit / n:.4f}" + ("" if low == high else f" ({low / n:.4f}-{high / n:.4f})")
                     for hit, low, high in bounds]
            table.add_row(f"{chosen} {_FILTERS[chosen]}", group, str(n), *cells)
    console.print(table)
    whole = result.targets["all"]
    console.print(f"{counted} of {rows} rows scored; one hit of {whole} is {1 / whole:.4f}. In parentheses: the least "
                  "and the most over all choices between equally near names.", soft_wrap=True)
    table = Table("what recall hides", "share")
    for key, share in asdict(hidden).items():
        if share is not None:
            table.add_row(_SHARES[key], f"{share:.3f}")
    console.print(table)
    if compared:
        table = Table("hits only here / only there (p)", *(f"@{k}" for k in KS))
        for name, pairs in compared.items():
            cells = [f"{x.only_first} / {x.only_second} ({x.p:.2g})" for x in pairs]
            table.add_row(f"{name} {_FILTERS[name]}", *cells)
        console.print(table)
        console.print(f"there: {plain(against or '')}; p: exact McNemar test, two-sided", soft_wrap=True)
