"""What people see: progress with the remaining time on stderr, notes, and tables on stdout.

Texts of models and files are printed as plain text: no markup, no control characters. Refuses to know models and how
anything is computed. Source: none, presentation only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from selfparam.store import number
from selfparam.store.snapshots import Snapshot

EVERY = 60.0  # seconds between two lines of progress where stderr is no terminal
_WIDTH = 120  # columns of a table where stdout is no terminal


class Bar:
    """One line of progress: call it with (done, total); `says` changes its words, `then` starts the next line.

    log: takes the line as text now and then, where there is no terminal to draw it on. alike: whether what is counted
    takes about as long each, so that the time that is left can be told from it.
    """

    def __init__(self, progress: Progress, title: str, log: Callable[[str], None] | None = None,
                 alike: bool = True) -> None:
        self._progress, self._log, self._logged, self._alike = progress, log, time.monotonic(), alike
        self.then(title)

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total, count=f"{done}/{total}",
                              left="left" if self._alike else "")
        self._tell()

    def says(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        self._tell()

    def _tell(self) -> None:
        if not self._log or time.monotonic() - self._logged < EVERY:
            return
        self._logged, task = time.monotonic(), self._progress.tasks[self._task]
        remaining = task.time_remaining if self._alike else None
        left = f", about {timedelta(seconds=int(remaining))} left" if remaining else ""
        self._log(f"{task.description} {task.fields['count']} after {timedelta(seconds=int(task.elapsed or 0))}{left}")

    def then(self, title: str) -> None:
        self._task = self._progress.add_task(title, total=None, count="", left="")


class Journal:
    """What happens while a command runs: steps with progress, notes, seconds of each step.

    Where stderr is no terminal a long step prints a line a minute; with `machine` (--json) nothing is printed, notes
    are kept.
    """

    def __init__(self, machine: bool = False) -> None:
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        self._machine = machine
        self._begin = time.perf_counter()
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, alike: bool = True) -> Iterator[Bar]:
        """A long step; its line stays with the time it took. alike: as Bar has it."""
        begin = time.perf_counter()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[count]}"),
                   TimeElapsedColumn(), TextColumn("{task.fields[left]}"), *([TimeRemainingColumn()] if alike else []))
        quiet = self._machine or not self._console.is_terminal
        with Progress(*columns, console=self._console, disable=quiet, speed_estimate_period=600) as progress:
            yield Bar(progress, title, self._print if quiet and not self._machine else None, alike)
            for task in progress.tasks:
                progress.update(task.id, total=task.total or 1, completed=task.total or 1)
        self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - begin

    def note(self, text: str) -> None:
        """Something that the user has to know, such as a file that was skipped."""
        self.notes.append(text)
        if not self._machine:
            self._print(f"note: {text}")

    def _print(self, text: str) -> None:
        self._console.print(plain(text), soft_wrap=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.perf_counter() - self._begin


def plain(text: str) -> str:
    """Text of one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def output() -> Console:
    """Where tables go: stdout as it is now."""
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def answers_table(exam: dict[str, Any]) -> Table:
    """Question by question: what was answered before and after, with the context, and what is right (Exam.as_dict)."""
    table = Table("question", "before", "after", "with the document", "right answer", "F1 after")
    for one in exam["questions"]:
        cells = (one["question"], one["before"], one["after"], one["with_context"] or "-", one["answers"][0])
        table.add_row(*map(plain, cells), number(one["f1_after"]))
    return table


def scores_table(scores: dict[str, dict[str, Any]]) -> Table:
    """Mean F1 before, with the context in the prompt, and after, for each group of questions."""
    table = Table("mean F1", "questions", "before", "with the document", "after")
    for label, s in scores.items():
        means = (number(s[key]) for key in ("before", "with_context", "after"))
        table.add_row(plain(label), str(s["questions"]), *means)
    return table


def drift_line(drift: float) -> str:
    return f"drift: {drift:.4f} nats per token (mean KL from before, on held-out unrelated text; below 0.1 is little)"


def contexts_table(contexts: Sequence[dict[str, Any]]) -> Table:
    table = Table("context", "source", "id", "pairs", "unrelated", "written by")
    for x in contexts:
        counts = (str(len(x["related"])), str(len(x["unrelated"])))
        table.add_row(plain(x["title"]), plain(x["source"]), x["id"], *counts, plain(x["author"]))
    return table


def history_table(record: dict[str, Any]) -> Table:
    """The lineage, oldest first, the record's own injection last."""
    table = Table("injected", "into", "contexts", "F1 before", "F1 after", "drift")
    for one in (*record["history"], record):
        titles = ", ".join(x["title"] or x["source"] or x["id"] for x in one["contexts"])
        score: dict[str, Any] = next(iter(one["scores"].values()), {})
        table.add_row(one["created"], plain(one["base"]["name"]), plain(titles), number(score.get("before")),
                      number(score.get("after")), number(one["drift"], 4))
    return table


def log_table(snapshots: Sequence[Snapshot], head: str, line: set[str]) -> Table:
    """Snapshots in the order given; the head has a star, what is not behind it says why."""
    table = Table(Column("snapshot", no_wrap=True, min_width=14), "when", "learned", "F1 before", "F1 after", "drift",
                  "guard")
    for one in snapshots:
        record = one.record
        scores = record.get("scores", {})  # held-out questions before training pairs; probes are about other contexts
        score: dict[str, Any] = next((scores[label] for label in sorted(scores) if not label.startswith("probes")), {})
        learned = ", ".join(x["source"] or x["id"] for x in record["contexts"]) or f"({record['base']['name']})"
        state = "refused" if one.refused else "forced" if one.forced else "passed" if one.parent else ""
        if one.id not in line and not one.refused:
            state += ", not behind the head"
        table.add_row(("* " if one.id == head else "  ") + one.id[:12], one.created[:16].replace("T", " "),
                      plain(learned), number(score.get("before")), number(score.get("after")),
                      number(record.get("drift"), 4), state)
    return table


def guard_table(guard: dict[str, Any]) -> Table:
    """What the guard measured, its limits, and what it objects to."""
    table = Table("guard", "measured", "limit")
    for name, limit in guard["limits"].items():
        measured = guard["measured"].get(name)
        table.add_row(name, number(measured, 3), f"{limit:g}")
    for fault in guard["faults"]:
        table.add_row("refused" if not guard["forced"] else "forced", plain(fault), "")
    return table


def answers_changed(answers: Sequence[dict[str, Any]]) -> Table:
    table = Table("question", "before", "after", "right answer", "F1 before", "F1 after")
    for one in answers:
        cells = (one["question"], one["before"], one["after"], one["answers"][0])
        table.add_row(*map(plain, cells), number(one["f1_before"]), number(one["f1_after"]))
    return table
