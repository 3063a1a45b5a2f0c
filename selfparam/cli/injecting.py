"""`selfparam inject` behind its options: documents and wishes -> a Job, a Job -> a model directory or a snapshot.

Imported inside the command, because it imports torch. Refuses to know how anything is computed.
Source: SELF-PARAM, arXiv 2410.00487; section numbers in the other rooms.
"""

from __future__ import annotations

import json
import secrets
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfparam import learn, steps
from selfparam.disk import reason
from selfparam.errors import InjectionError, OutputError, RefusedError, StoppedError
from selfparam.inject.checkpoint import Checkpoints
from selfparam.inject.curvature import Curvature
from selfparam.inject.teacher import check_model
from selfparam.inject.trainable import experts
from selfparam.job import Job, drop_job, read_job, save_job
from selfparam.lm import LM
from selfparam.report import Journal, drift_line, guard_table, output, plain, scores_table
from selfparam.store import RECORD, check_out, read_record, write_model
from selfparam.store.snapshots import Snapshot, Store
from selfparam.types import Context, Recipe

__all__ = ["Wishes", "drop_job", "finish", "is_written", "load", "plan", "prepare", "read_job", "save_job"]

_PROBES = 8  # training sentences on which the written model is compared with the one in memory


@dataclass(frozen=True)
class Wishes:
    """The options of `inject` that shape the training, as they were given. changes: of the recipe, None = unchanged.

    history: the injections that the model directory has behind it.
    """

    model: str
    targets: str | None
    pairs: int
    author: str
    endpoint: str | None
    endpoint_model: str | None
    prompt: str | None
    unrelated: str
    ratio: float | None
    recipe: str
    changes: dict[str, Any]
    questions: str | None
    probes: str | None
    adapter: bool
    offline: bool
    dtype: str
    device: str
    force: bool
    history: list[dict[str, Any]]


@dataclass
class Start:
    """What the training begins with: the model, and what is at hand of earlier injections where the recipe needs it.

    first: θ before all of them, the teacher where something is rehearsed. curvature: of all of them.
    """

    lm: LM
    first: LM | None = None
    curvature: Curvature | None = None


def prepare(wish: Wishes, contexts: Sequence[Context], store: Store | None, out: str | None, journal: Journal
            ) -> tuple[Job, Start]:
    """Everything up to the training: what is to be done, and what with. Writes nothing."""
    seed = wish.changes["seed"]
    sets = steps.own_sets(wish.targets, contexts) if wish.targets else []
    known = list(contexts) or [one.context for one in sets]
    asked = steps.read_questions(wish.questions, known) if wish.questions else []
    probes = learn.read_probes(wish.probes) if wish.probes else ()
    parent = store.find() if store else None
    if store and parent:
        store.tidy()
        probes = probes or learn.kept_probes(store, parent)
        lm = learn.load_snapshot(store, parent, journal, wish.device)
        if not probes and parent.parent:
            journal.note("no questions about earlier documents to ask: what is forgotten is not measured (--probes)")
        surprise = learn.check_readable(lm, known, store.limits, wish.force, journal)
    else:
        lm = steps.load(wish.model, journal, dtype=wish.dtype, device=wish.device, offline=wish.offline)
        check_out(str(out), needed=steps.weight_bytes(lm))
        surprise = None
    recipe, start, writer = plan(lm, store, parent, wish.history, journal, wish.device, wish.recipe, **wish.changes)
    check_model(lm, recipe)
    if recipe.lora_dropout and recipe.train == "lora" and experts(lm):
        recipe = recipe.but(lora_dropout=0.0)
        journal.note(f"'{lm.name}' is a mixture of experts: no dropout, which peft does not have for them")
    if lm.apart:
        journal.note(f"'{lm.name}' is no plain transformer: sentences are read one to a line, which takes longer")
    sets = sets or steps.written_sets(
        writer, contexts, journal, author=wish.author, prompt=wish.prompt, pairs=wish.pairs, seed=seed,
        offline=wish.offline, endpoint=wish.endpoint, endpoint_model=wish.endpoint_model,
    )
    sets, _ = steps.without_questions(sets, [*asked, *probes], journal)
    if (start.curvature or recipe.known) and wish.changes["retention"] is None:
        recipe = steps.lighter(lm, sets, recipe, journal)
    sets = steps.with_unrelated(
        start.first or lm, sets, journal, source=wish.unrelated, ratio=wish.ratio, recipe=recipe)
    if recipe.rehearsal:
        sets = steps.with_rehearsed(lm, sets, journal, recipe, start.first)
    job = Job(
        id=secrets.token_hex(16), model=wish.model, sets=tuple(sets), recipe=recipe, parent=parent.id if parent else "",
        held_out=(Path(wish.questions).name, tuple(asked)) if wish.questions else None,
        probes=(Path(wish.probes).name if wish.probes else "kept", tuple(probes)) if probes else None,
        surprise=surprise, adapter=wish.adapter, force=wish.force, dtype=wish.dtype, device=wish.device,
        offline=wish.offline,
    )
    return job, start


def plan(lm: LM, store: Store | None, parent: Snapshot | None, history: list[dict[str, Any]], journal: Journal,
         device: str, name: str, **changes: Any) -> tuple[Recipe, Start, LM]:
    """The recipe, what is at hand for it, and who writes the pairs: θ before all injections, where there is one.

    Who has learned much writes worse.
    """
    follows = bool(history or (parent and parent.parent))
    curvature = learn.kept_curvature(store, parent) if store and parent else None
    recipe = steps.choose_recipe(lm, name, sequence=store is not None and (not follows or curvature is not None),
                                 follows=follows, **changes)
    if store and follows and recipe.rehearsal and not curvature:
        journal.note("no curvature of earlier injections is at hand: what they taught is rehearsed, which takes longer")
    first = _first(store, parent, history, journal, device) if recipe.rehearsal or recipe.retention else None
    return recipe, Start(lm, first if recipe.rehearsal else None, curvature if recipe.retention else None), first or lm


def _first(store: Store | None, parent: Snapshot | None, history: list[dict[str, Any]], journal: Journal, device: str
           ) -> LM | None:
    """θ before all injections, where there were some and it is at hand."""
    if store and parent:
        return learn.load_snapshot(store, store.lineage(parent.id)[0], journal, device) if parent.parent else None
    return steps.first_of(history, journal, device=device) if history else None


def load(job: Job, store: Store | None, history: list[dict[str, Any]], journal: Journal) -> Start:
    """What an interrupted job started with."""
    parent = store.snapshot(job.parent) if store else None
    lm = (learn.load_snapshot(store, parent, journal, job.device) if store and parent else
          steps.load(job.model, journal, dtype=job.dtype, device=job.device, offline=job.offline))
    return Start(lm, _first(store, parent, history, journal, job.device) if job.recipe.rehearsal else None,
                 learn.kept_curvature(store, parent) if store and parent and job.recipe.retention else None)


def finish(job: Job, start: Start, store: Store | None, out: str | None, place: Path, journal: Journal, machine: bool,
           *, command: str, every: float, history: list[dict[str, Any]]) -> None:
    """Train and write. The job stays on disk unless it is done, or would end the same way again."""
    checkpoints = Checkpoints(place, every=every, advice=command, note=journal.note)
    try:
        with learn.stoppable(checkpoints):
            if store:
                snapshot = learn.into_store(store, job, start.lm, journal, checkpoints, start.first, start.curvature)
            else:
                said = _into_directory(job, start, str(out), journal, checkpoints, history)
    except StoppedError:
        raise
    except (OutputError, OSError) as error:
        what = str(error) if isinstance(error, OutputError) else f"{reason(error)}: make room"
        raise OutputError(f"{what}; then continue with  {command}") from error
    except Exception as error:
        if isinstance(error, InjectionError) and error.__cause__ is None:  # with a cause: memory was short
            drop_job(place)
        else:
            journal.note(f"what was done is kept: continue with  {command}  or drop it with --restart")
        raise
    drop_job(place)
    if store:
        _tell(store, snapshot, journal, machine)
    elif machine:
        print(json.dumps(said, indent=1))
    else:
        console = output()
        console.print(scores_table(said["scores"]))
        console.print(drift_line(said["drift"]))
        size, dtype = said["bytes"] / 1e6, said["base"]["dtype"]
        console.print(f"written: {plain(str(out))} ({size:.0f} MB, {dtype}, {journal.elapsed:.0f} seconds)",
                      f'ask it:  selfparam ask {plain(shlex.quote(str(out)))} "…"', sep="\n", soft_wrap=True)


def is_written(job: Job, out: str) -> bool:
    """The model directory of this job is there: it was killed between writing that and dropping the job."""
    return (Path(out) / RECORD).is_file() and read_record(out).get("job") == job.id


def _into_directory(job: Job, start: Start, out: str, journal: Journal, checkpoints: Checkpoints,
                    history: list[dict[str, Any]]) -> dict[str, Any]:
    if is_written(job, out):
        journal.note("the model was already written")
        size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
        return {"out": out, "bytes": size, "notes": journal.notes, **read_record(out)}
    base, exams = steps.base_of(start.lm), [steps.training_exam(job.sets)]
    if job.held_out:
        exams.append(steps.exam_of(f"held-out: {job.held_out[0]}", job.held_out[1], job.sets))
    done, drift = steps.run(start.lm, job.sets, job.recipe, exams, journal, job.adapter, checkpoints, start.first)
    record = {"job": job.id, **steps.record_of(base, job.sets, job.recipe, done, drift, exams, history)}
    probe = [s for one in job.sets for s in (*one.related, *one.unrelated)][:_PROBES]
    with journal.step("writing the model") as bar:
        size = write_model(out, done.lm, record, probe, adapter=done.adapter, progress=bar)
    return {"out": out, "bytes": size, "notes": journal.notes, **record}


def _tell(store: Store, snapshot: Snapshot, journal: Journal, machine: bool) -> None:
    """The scores and the guard's word. Raises RefusedError where it is kept aside."""
    if machine:
        sys.stdout.write(json.dumps({"snapshot": snapshot.id, "parent": snapshot.parent, "refused": snapshot.refused,
                                     "notes": journal.notes, **snapshot.record}, indent=1) + "\n")
    else:
        output().print(scores_table(snapshot.record["scores"]), guard_table(snapshot.record["guard"]))
    if snapshot.refused:
        raise RefusedError(f"refused and kept aside as {snapshot.id[:12]} ({'; '.join(snapshot.faults)}); the head "
                           f"stays at {str(store.head)[:12]}: look at 'selfparam diff', or inject with --force")
    if not machine:
        output().print(f"head: {snapshot.id[:12]} ({journal.elapsed:.0f} seconds)"
                       + (", forced past the guard" if snapshot.forced else ""),
                       f'ask it:  selfparam ask {plain(store.typed)} "…"', sep="\n", soft_wrap=True)
