"""Run a table: expand its cells, skip finished ones, do the others here, in local processes, or through Ray.

Rows are appended as cells finish, so an interrupted run goes on where it stopped. Refuses to know how cells are
measured and how tables are shown. Source: arXiv 2410.00487, section 4.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

import torch

from selfparam.errors import AuthorError, InjectionError, ModelError, TableError, TargetError
from selfparam.experiments.authors import sets_by
from selfparam.experiments.lab import Lab, open_lab
from selfparam.experiments.protocols import PROTOCOLS, members, stacked
from selfparam.experiments.recommending import Scores
from selfparam.experiments.rows import Row, append_row, read_rows, usable, write_rows
from selfparam.experiments.spec import Cell, ModelSpec, Table, authors_of, cells_of
from selfparam.experiments.unfinished import Unfinished
from selfparam.inject import precision
from selfparam.inject.stack import STACK
from selfparam.lm import LM
from selfparam.methods import Stacking
from selfparam.steps import cache_folder, peak_memory_mb, versions
from selfparam.types import Recipe, TargetSet, content_hash

Says = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """A cell with the pairs of its contexts."""

    cell: Cell
    sets: tuple[TargetSet, ...]


@dataclass(frozen=True)
class Done:
    """What a run did. failed: cells whose method could not do it (kept as rows with "error", tried again next time)."""

    cells: int
    ran: int
    failed: int
    dropped: int
    notes: tuple[str, ...]


def run_table(table: Table, *, workers: int = 1, ray: bool = False, stack: int = STACK,
              says: Says = lambda text: None, progress: Progress = lambda done, total: None) -> Done:
    """Fill the gaps in the rows of the table. Raises SelfParamError; what is finished stays.

    stack: so many contexts of the protocol single are trained together, where their method can.
    """
    cells, ran, failed = cells_of(table), 0, 0
    notes: list[str] = []
    rows = read_rows(table.results)
    for model in table.models:
        lab = open_lab(table, model, says)
        notes += lab.bench.notes
        own = [cell for cell in cells if cell.model == model]
        todo = [c for c in own if not usable(rows.get(c.id), lab.model_hash, data_hash(table, lab, c))]
        jobs = _jobs(table, lab, todo, says)
        finished = len(own) - len(jobs)
        progress(finished, len(own))
        for row in _rows(table, model, lab, _stacks(table, jobs, stack), workers, ray, says):
            append_row(table.results, row)
            rows[row["cell"]] = row
            ran, failed, finished = ran + 1, failed + ("error" in row), finished + 1
            progress(finished, len(own))
    ids = [cell.id for cell in cells]
    dropped = len(set(rows) - set(ids))
    write_rows(table.results, (rows[i] for i in ids))
    return Done(len(cells), ran, failed, dropped, tuple(dict.fromkeys(notes)))


def _jobs(table: Table, lab: Lab, cells: Sequence[Cell], says: Says) -> list[Job]:
    """The cells with their target sets, written once for all of them; all methods of a context before the next.

    An erring author takes its wrong answers from all contexts of the table, whichever cells are missing.
    """
    wanted: dict[str, set[int]] = {}
    for cell in cells:
        wanted.setdefault(cell.method.author, set()).update(members(table, cell))
    written: dict[str, dict[int, TargetSet]] = {}
    for author, indices in wanted.items():
        errs = any(one.kind == "erring" for one in authors_of(table, author).values())
        order = range(len(lab.bench.items)) if errs else sorted(indices)
        items = [lab.bench.items[i] for i in order]
        sets = [TargetSet(item.context, ()) for item in items]
        if author:
            says(f"pairs by {author}")
            sets = sets_by(author, dict(table.authors), lab.lm, items, table.seed, cache_folder(), says)
        written[author] = dict(zip(order, sets, strict=True))
    ordered = sorted(cells, key=lambda cell: cell.index)
    return [Job(cell, tuple(_cut(written[cell.method.author][i], cell.method.pairs) for i in members(table, cell)))
            for cell in ordered]


def data_hash(table: Table, lab: Lab, cell: Cell) -> str:
    """Hash of the cell's own items and the fresh ones."""
    return replace(lab.bench, items=tuple(lab.bench.items[i] for i in members(table, cell))).hash


def _cut(one: TargetSet, pairs: int) -> TargetSet:
    """At most `pairs` pairs (0: all), evenly chosen: pairs about one fact often stand together."""
    count = len(one.related)
    if not pairs or count <= pairs:
        return one
    return TargetSet(one.context, tuple(one.related[i * count // pairs] for i in range(pairs)), (), one.author)


def _stacks(table: Table, jobs: Sequence[Job], stack: int) -> list[list[Job]]:
    """Jobs that are done together: up to `stack` cells of a method that stacks, in the order of their first; or one."""
    found: list[list[Job]] = []
    filling: dict[str, list[Job]] = {}
    for job in jobs:
        method, key = job.cell.method.make(), job.cell.settings
        size = stack if table.protocol == "single" and isinstance(method, Stacking) and method.stacks else 1
        if len(filling.get(key, ())) in (0, size):
            filling[key] = []
            found.append(filling[key])
        filling[key].append(job)
    return found


def _rows(table: Table, model: ModelSpec, lab: Lab, stacks: Sequence[Sequence[Job]], workers: int, ray: bool,
          says: Says) -> Iterator[Row]:
    """The jobs' rows, in the order in which they finish."""
    if ray:
        yield from _by_ray(table, model, stacks, workers)
    elif workers > 1 and len(stacks) > 1:
        yield from _by_processes(table, model, stacks, workers)
    else:
        for jobs in stacks:
            says(f"{jobs[0].cell.method.label} {', '.join(str(job.cell.index + 1) for job in jobs)}")
            yield from rows_of(table, lab, jobs, says)


def rows_of(table: Table, lab: Lab, jobs: Sequence[Job], says: Says = lambda text: None) -> Iterator[Row]:
    """The rows of jobs that are done together; one by one where that fails, so that only the guilty ones do."""
    method = jobs[0].cell.method.make()
    if len(jobs) > 1 and isinstance(method, Stacking):
        try:
            found = stacked(lab, table, [job.cell for job in jobs], [one for job in jobs for one in job.sets], method)
            yield from (_row(table, lab, job.cell, scores) for job, scores in zip(jobs, found, strict=True))
            return
        except (ModelError, InjectionError, TargetError):
            pass
    for job in jobs:
        yield row_of(table, lab, job, says)


def row_of(table: Table, lab: Lab, job: Job, says: Says) -> Row:
    """The row of one cell. What a method cannot do is a row with "error"; other errors end the run."""
    key = content_hash(job.cell.id, lab.model_hash, data_hash(table, lab, job.cell))
    unfinished = Unfinished(table.results.with_suffix(".unfinished") / key,
                            lambda text: says(f"{job.cell.method.label} {job.cell.index + 1}: {text}"))
    try:
        scores = PROTOCOLS[table.protocol](lab, table, job.cell, job.sets, unfinished)
    except (AuthorError, TableError):
        raise
    except (ModelError, InjectionError, TargetError) as error:
        scores = {"error": str(error)}
    unfinished.drop()
    return _row(table, lab, job.cell, scores)


def _row(table: Table, lab: Lab, cell: Cell, scores: Scores) -> Row:
    """Scores with their provenance."""
    if not table.keep_questions and "answers" in scores:
        scores["answers"] = [(about, content_hash(text), *rest) for about, text, *rest in scores["answers"]]
    return {
        "cell": cell.id, "table": table.name, "protocol": table.protocol, "model": cell.model.shown,
        "method": cell.method.label, "author": cell.method.author, "n": cell.n, "index": cell.index,
        "model_hash": lab.model_hash, "data_hash": data_hash(table, lab, cell), **scores,
        "settings": json.loads(cell.settings), "versions": versions(), "machine": machine(lab.lm),
        "peak_memory_mb": peak_memory_mb(lab.lm.device),
    }


def machine(lm: LM) -> dict[str, str]:
    """Where the weights are, and in which precision: as they are held, and as recipes with precision "auto" train."""
    with precision(lm, Recipe(precision="auto")):
        fast = torch.is_autocast_enabled(lm.device.type)
    held = str(lm.model.dtype).removeprefix("torch.")
    return {"device": lm.device.type, "dtype": held, "auto": "bfloat16" if fast else held}


# --- other processes --------------------------------------------------------------------------------------------------

_open: dict[str, Lab] = {}


def in_worker(table: Table, model: ModelSpec, jobs: Sequence[Job]) -> list[Row]:
    """rows_of in a process of its own, which keeps the lab of its last model."""
    key = f"{table.name} {model}"
    if key not in _open:
        _open.clear()
        _open[key] = open_lab(table, model)
    return list(rows_of(table, _open[key], jobs))


def _by_processes(table: Table, model: ModelSpec, stacks: Sequence[Sequence[Job]], workers: int) -> Iterator[Row]:
    """Spawned processes with one thread each: on few cores, faster than one process with many threads."""
    with _one_thread():
        pool = ProcessPoolExecutor(min(workers, len(stacks)), mp_context=get_context("spawn"), initializer=_begin)
        try:
            waiting = [pool.submit(in_worker, table, model, jobs) for jobs in stacks]
            ended = []
            for done in as_completed(waiting):
                ended.append(done)
                if error := done.exception():
                    for other in as_completed(one for one in waiting if one not in ended and not one.cancel()):
                        if not other.exception():  # those that were running, to their ends
                            yield from other.result()
                    raise error
                yield from done.result()
        except BrokenProcessPool as error:
            raise TableError("a worker process died, perhaps out of memory: use fewer --workers; what is finished is "
                             "kept") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """In a new process: Ctrl-C ends it without a word, so does the end of the process that began it; no warnings."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()  # returns when it is gone, however it ended: nobody would collect the rows
        os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Environment of the processes started inside."""
    wanted = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _by_ray(table: Table, model: ModelSpec, stacks: Sequence[Sequence[Job]], workers: int) -> Iterator[Row]:
    """Ray: the cluster of RAY_ADDRESS, or a local one with `workers` processors.

    A GPU each where the model asks for one, or for none in particular ("auto") and the cluster has some.
    """
    try:
        import ray
    except ImportError as error:
        raise TableError("--ray needs the package 'ray': pip install 'selfparam[cluster]', or use --workers") from error
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
    asks = model.device.startswith("cuda") or (model.device == "auto" and "GPU" in ray.cluster_resources())
    task = ray.remote(num_cpus=1, num_gpus=int(asks))(in_worker)
    shared = ray.put(table)
    waiting = [task.remote(shared, model, jobs) for jobs in stacks]
    failed = None
    try:
        while waiting:
            [done], waiting = ray.wait(waiting, num_returns=1)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                failed = error  # the others end first: what is finished is kept
        if failed:
            raise failed.cause from failed
    finally:
        if not address:
            ray.shutdown()
