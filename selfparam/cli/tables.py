"""selfparam run | table: run the tables of the paper, and show them.

Refuses to know how cells are measured. Source: arXiv 2410.00487, section 4; docs/tables.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from selfparam.report import Journal, output, plain

if TYPE_CHECKING:
    from selfparam.experiments.plan import Planned

TableFile = Annotated[str, typer.Argument(metavar="TABLE", help="A table as a TOML file, such as tables/single.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines and nothing else.")]


def run(
    table: TableFile,
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time, each in a process of its own with one thread; "
                                                     "with --ray, processors of a local Ray.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Run cells through Ray (RAY_ADDRESS names a cluster).")] = False,
    stack: Annotated[int, typer.Option(min=1, help="Contexts of the protocol single that are trained together, where "
                                                   "the method can; memory grows with it.")] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; load nothing.")] = False,
    tflops: Annotated[float | None, typer.Option(min=0.001, show_default="measured here", help=(
        "For --dry-run: operations a second (in 10^12) of the machine it will run on."))] = None,
    machine: Json = False,
) -> None:
    """Run what is missing of a table; rows go to results/ beside the folder of the table.

    Interrupt it whenever you like: the next run goes on, inside of a long cell too.

    Example: selfparam run tables/single.toml --workers 2
    """
    from selfparam.experiments.rows import read_rows
    from selfparam.experiments.spec import read_table

    found = read_table(table)
    if dry_run:
        from selfparam.experiments.plan import plan, speed

        tflops = tflops or speed()
        _show_plan(plan(found, read_rows(found.results), tflops), tflops, machine)
        return
    from selfparam.experiments.run import run_table

    journal = Journal(machine)
    with journal.step(f"running {found.name}", alike=found.protocol == "single") as bar:  # long cells say it themselves
        done = run_table(found, workers=workers, ray=ray, stack=stack,
                         says=lambda text: bar.says(f"{found.name}: {text}"), progress=bar)
    for note in done.notes:
        journal.note(note)
    if done.dropped:
        journal.note(f"{done.dropped} rows of cells that are no longer in the table were dropped")
    if done.failed:
        journal.note(f"{done.failed} cells failed; 'selfparam table {table}' says why; the next run tries them again")
    if machine:
        counts = {"cells": done.cells, "ran": done.ran, "failed": done.failed, "dropped": done.dropped}
        sys.stdout.write(json.dumps({**counts, "rows": str(found.results), "notes": journal.notes}) + "\n")
        return
    output().print(f"{done.cells} cells, {done.ran} of them run now ({journal.elapsed:.0f} seconds): "
                   f"{plain(str(found.results))}", f"show them:  selfparam table {plain(table)}", sep="\n",
                   soft_wrap=True)


def table(
    table: TableFile,
    form: Annotated[Literal["text", "markdown", "csv"], typer.Option("--format", help="How to write it.")] = "text",
    out: Annotated[str | None, typer.Option(help="File to write to, instead of the terminal.")] = None,
    figure: Annotated[str | None, typer.Option(
        help="Draw the sequences (figure 2 of the paper) into this file: .png, .svg or .pdf.")] = None,
) -> None:
    """Show a table from the rows that are there, with the paper's figures beside them.

    Example: selfparam table tables/single.toml --format markdown --out docs/results.md
    """
    from selfparam.errors import OutputError, TableError
    from selfparam.experiments import render
    from selfparam.experiments.rows import read_rows
    from selfparam.experiments.spec import read_table
    from selfparam.experiments.summary import blocks_of

    found = read_table(table)
    rows = read_rows(found.results)
    if not rows:
        raise TableError(f"no rows in '{found.results}': run 'selfparam run {table}' first")
    if figure:
        from selfparam.experiments.figure import draw

        draw(found, rows, figure)
    blocks = blocks_of(found, rows)
    command = f"selfparam run tables/{Path(table).name}"
    shown = {"text": lambda: render.text(found, blocks), "csv": lambda: render.as_csv(found, blocks),
             "markdown": lambda: render.markdown(found, blocks, command, Path(figure).name if figure else "")}[form]()
    if out is None:
        sys.stdout.write(shown)
        return
    try:
        Path(out).write_text(shown, "utf-8")
    except OSError as error:
        raise OutputError(f"cannot write to '{out}' ({error.strerror}): choose another file") from error


def _show_plan(lines: list[Planned], tflops: float, machine: bool) -> None:
    """The plan as a table, with sums."""
    from dataclasses import asdict

    if machine:
        sys.stdout.write(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
        return
    from rich.table import Table as Lines

    shown = Lines("model", "method", "contexts", "cells", "missing", "memory, GB", "hours", "hours from")
    for line in lines:
        gb = "unknown" if line.memory_gb is None else f"{line.memory_gb:.1f}"
        hours = "unknown" if line.seconds is None else f"{line.seconds / 3600:.2f}"
        shown.add_row(plain(line.model), plain(line.method), str(line.n), str(line.cells), str(line.missing), gb, hours,
                      "rows" if line.measured else f"{tflops:.2g} TFLOP/s")
    total = sum(line.seconds or 0.0 for line in lines) / 3600
    output().print(shown, f"{sum(line.missing for line in lines)} cells to run, about {total:.2f} hours on one worker")
    for line in lines:
        if line.failed:
            output().print(f"{plain(line.method)}: {line.failed} of {line.missing} failed before, and would be tried "
                           "again ('selfparam table' says why)")
