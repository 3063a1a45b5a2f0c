"""A table as text, Markdown or CSV. Refuses to know where its numbers come from. Source: none, presentation only."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from selfparam.experiments.spec import Table
from selfparam.experiments.summary import Block, Interval, Line
from selfparam.metrics.recall import FILTERS

LEGEND = {
    "F1": "QA-F1 of LongBench, mean over the questions of a context, then over contexts",
    "95 %": "bootstrap interval over contexts (in sequences: over sequences)",
    "paper": "the figure of arXiv 2410.00487 for the model named there, which is another model than ours",
    "gain": "difference to the best baseline ({best}), or to the row that a note names, on the same contexts, "
            "with its interval",
    "just": "F1 on each context right after its step, mean over contexts",
    "forget": "forgetting: best F1 on an earlier context so far, minus F1 at the end (Chaudhry et al. 2018)",
    "BWT": "backward transfer: F1 on an earlier context at the end, minus after its step (Lopez-Paz & Ranzato 2017)",
    "new": "share of changed facts that are answered with the new value, exactly",
    "old": "share of changed facts that are answered with the old value",
    "leak": "F1 of the injected answers when the same questions name another subject: compare with the base's (in "
            "sequences: of the first contexts, so what is forgotten cannot leak)",
    "fresh": "F1 on new contexts with the text in front: does it still read",
    "world": "F1 on facts that it knew before",
    "KL": "drift on held-out unrelated text, nats per token",
    "S": "tokens kept outside the weights",
    "r1": "Recall@1 over all targets, names as they are (in parentheses: the least and most over all ties)",
    "r2": "the same without names mentioned earlier in the conversation",
    "r3": "without titles more than two edits away from every name",
    "r4": "without both",
    "@20": "Recall@20 with the filter {filter}",
    "p": "exact McNemar test between the hits of this row and of the row that the gain is measured against",
    "lists": "share of outputs with a numbered list",
    "unknown": "share of titles that are no entity",
    "s": "seconds to absorb, one cell",
    "s/step": "seconds to absorb, one step of a sequence",
}


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(value: Interval | None) -> str:
    return "-" if value is None else f"{value[0]:.2f} to {value[1]:.2f}"


def _bounded(value: float, low: float, high: float) -> str:
    return f"{value:.3f}" + ("" if low == high else f" ({low:.3f}-{high:.3f})")


def columns(table: Table, block: Block) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a block; columns without any number are left out."""
    paper = f"paper ({block.model.paper})" if block.model.paper else "paper"
    heads = ["method", "pairs", "n", "F1", "r1", "r2", "r3", "r4", "95 %", paper, "gain", "p", "@20", "lists",
             "unknown", "just", "forget", "BWT", "new", "old", "leak", "fresh", "world", "KL", "S", "s", "s/step"]
    lines = [_cells(line) for line in block.lines]
    kept = [0, *(i for i in range(1, len(heads)) if any(cells[i] != "-" for cells in lines))]
    return [heads[i] for i in kept], [[cells[i] for i in kept] for cells in lines]


def _cells(line: Line) -> list[str]:
    gain = "-" if line.gain is None else f"{line.gain[0]:+.2f} ({_interval(line.gain[1])})"
    done = str(line.done) if line.done == line.cells else f"{line.done} of {line.cells}"
    storage = "-" if line.storage is None else f"{line.storage:,.0f}"
    recalls = [_bounded(*line.recall[r]) if line.recall else "-" for r in FILTERS]
    p = "-" if line.p is None else f"{line.p:.2g}"
    return [line.method.label, line.method.author or "-", done, number(line.f1, 3), *recalls, _interval(line.interval),
            number(line.paper, 4), gain, p, number(line.last, 3), number(line.lists), number(line.unknown),
            number(line.just), number(line.forgetting), number(line.bwt), number(line.new),
            number(line.old), number(line.leak), number(line.fresh), number(line.world), number(line.kl), storage,
            number(line.seconds, 1), number(line.step, 1)]


def heading(table: Table, block: Block) -> str:
    """What a block is about, in a few words."""
    size = {"single": f"{block.n} contexts, one at a time", "batch": f"{block.n} contexts at once",
            "sequential": f"{table.sequences} sequences of {block.n} contexts",
            "recommend": f"{block.n} conversations at once"}[table.protocol]
    return f"{block.model.shown}, {size}"


def legend(table: Table, heads: Sequence[str], block: Block) -> list[str]:
    """A sentence for every column that needs one."""
    words = [head.split(" (")[0] for head in heads]
    says = LEGEND
    if table.protocol == "recommend":
        says = {**LEGEND, "95 %": "bootstrap interval of {filter} over the conversations that are asked about (without "
                          "such: over targets)", "gain": "paired difference in {filter} with its interval"}
    values = {"best": block.baseline or "-", "filter": table.recommend.filter}
    return [f"{word}: {says[word].format(**values)}" for word in words if word in says]


def notes_of(block: Block) -> list[str]:
    """What the methods had to say, and what is wrong with the rows."""
    said: dict[str, list[str]] = {}
    for line in block.lines:
        for note in line.notes:
            said.setdefault(note, []).append(line.method.label)
    return [*block.notes, *(f"{'; '.join(labels)}: {note}" for note, labels in said.items())]


def text(table: Table, blocks: Sequence[Block]) -> str:
    """For a terminal: aligned columns."""
    parts = [table.title]
    for block in blocks:
        heads, lines = columns(table, block)
        widths = [max(len(row[i]) for row in [heads, *lines]) for i in range(len(heads))]
        shown = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                           for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                 for row in [heads, *lines]]
        parts += ["", heading(table, block), *shown, *(f"note: {note}" for note in notes_of(block))]
    return "\n".join(parts) + "\n"


def markdown(table: Table, blocks: Sequence[Block], command: str, figure: str = "") -> str:
    """A page: what the table says it is about, the blocks, and what the columns mean."""
    parts = [f"# {table.title}", ""]
    if table.about:
        parts += [table.about.strip(), ""]
    rows = f"../results/{table.name}.jsonl"
    parts += [f"`{command}` makes the rows ([results/{table.name}.jsonl]({rows})); a second time only those that are "
              "missing."]
    if figure:
        parts += ["", f"![{table.title}]({figure})"]
    for block in blocks:
        heads, lines = columns(table, block)
        parts += ["", f"## {heading(table, block)}", "", _row(heads), _row(["---"] * len(heads)), *map(_row, lines), ""]
        parts += [f"- {one}" for one in legend(table, heads, block)] + [f"- note: {one}" for one in notes_of(block)]
    return "\n".join(parts) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_csv(table: Table, blocks: Sequence[Block]) -> str:
    """For other programs: one line a method, numbers as they are, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "model", "contexts", "method", "pairs", "cells", "f1", "f1_low", "f1_high", "paper",
                     "gain", "gain_low", "gain_high", "just", "leak", "fresh", "world", "kl", "storage_tokens",
                     "seconds", "seconds_step", "forgetting", "bwt", "new", "old", *FILTERS, "at_20", "p"])
    for block in blocks:
        for line in block.lines:
            gain = (line.gain[0], *line.gain[1]) if line.gain else (None, None, None)
            writer.writerow([table.name, block.model.shown, block.n, line.method.label, line.method.author, line.done,
                             line.f1, *(line.interval or (None, None)), line.paper, *gain, line.just, line.leak,
                             line.fresh, line.world, line.kl, line.storage, line.seconds, line.step,
                             line.forgetting, line.bwt, line.new, line.old,
                             *(line.recall[r][0] if line.recall else None for r in FILTERS), line.last, line.p])
    return out.getvalue()
