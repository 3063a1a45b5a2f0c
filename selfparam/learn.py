"""The steps of a store: a first snapshot, an injection that becomes the next one if the guard lets it, what changed.

Refuses to know options and printing (a Journal is told what happens) and how files are laid out (selfparam.store).
Source: the sequential fold θ_i = inject(θ_{i-1}, ℰ(x_i)) of arXiv 2410.00487, section 4.3; the guard is ours.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from selfparam import steps
from selfparam.errors import OutputError, RefusedError, SelfParamError, StoppedError, StoreError
from selfparam.inject import MERGE_TOLERANCE
from selfparam.inject.checkpoint import Checkpoints
from selfparam.inject.curvature import Curvature
from selfparam.job import Job
from selfparam.lm import LM
from selfparam.metrics.drift import drift, reference
from selfparam.metrics.qa_f1 import qa_f1
from selfparam.metrics.surprise import surprise
from selfparam.report import Journal
from selfparam.store.directory import verify_reload, write_adapter
from selfparam.store.guard import Limits, Measured, faults
from selfparam.store.snapshots import Snapshot, Store, new_store
from selfparam.store.weights import can_drop, model_folder
from selfparam.targets import write_sets
from selfparam.targets.unrelated import packaged
from selfparam.types import Context, Question, Sentence, TargetSet, content_hash

KEPT_PROBES = 50  # questions about earlier contexts that are asked at most, where a store keeps texts
_CURVATURE = "curvature/directions.safetensors"
_CHECKED = 8  # sentences on which written weights are compared with those in memory
_PACKAGED = [Sentence("", text) for text in packaged("held-out")[:_CHECKED]]


# --- the first snapshot, and loading ---------------------------------------------------------------------------------


def begin_store(path: str, lm: LM, *, limits: Limits, keep_texts: bool) -> Snapshot:
    """A store whose head is the model as it is. Raises OutputError, VerificationError."""
    needed = steps.weight_bytes(lm)
    with new_store(path, limits=limits, keep_texts=keep_texts, needed=needed) as store, store.room() as room:
        _save(lm, room, _PACKAGED)
        record = {"base": steps.base_of(lm), "contexts": [], "versions": steps.versions()}
        return store.commit(room, record, parent=None, by="init")


def _save(lm: LM, folder: Path, probe: Sequence[Sentence], adapter: Any = None, curvature: Curvature | None = None
          ) -> None:
    """The model's files, loaded again and compared. Raises OutputError, VerificationError."""
    try:
        lm.save(folder)
        if adapter:
            write_adapter(folder / "adapter", *adapter)
        if curvature:
            (folder / _CURVATURE).parent.mkdir()
            curvature.save(folder / _CURVATURE)
        verify_reload(folder, lm, probe)
    except (SelfParamError, OSError):
        raise
    except Exception as error:  # safetensors raises kinds of its own
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise OutputError(f"cannot write the weights ({said}): make room") from error


def load_snapshot(store: Store, snapshot: Snapshot, journal: Journal, device: str = "auto") -> LM:
    """The snapshot's model under the name of the model it came from."""
    base = snapshot.record["base"]
    lm = steps.load(str(model_folder(store, snapshot)), journal, dtype=str(base["dtype"]), device=device, offline=True)
    lm.name, lm.revision = str(base["name"]), snapshot.id
    return lm


def kept_curvature(store: Store, snapshot: Snapshot) -> Curvature | None:
    """Of all injections up to the snapshot; None where one of them measured none, or gc took it.

    Raises StoreError, ModelError.
    """
    if _CURVATURE not in snapshot.files or _CURVATURE in store.missing(snapshot):
        return None
    return Curvature.load(store.sound(snapshot, _CURVATURE))


# --- before the training --------------------------------------------------------------------------------------------


def check_readable(lm: LM, contexts: Sequence[Context], limits: Limits, force: bool, journal: Journal) -> float | None:
    """Nats per byte of the strangest context. Raises RefusedError above the limit, before anything is spent on it."""
    if not contexts:
        return None
    with journal.step("reading the documents"):
        found = [(surprise(lm, x.text), x.title or x.source or x.id) for x in contexts]
    worst, name = max(found, key=lambda one: (math.isnan(one[0]), *one))
    if not worst <= limits.surprise and not force:
        raise RefusedError(f"'{name}' reads like random characters ({worst:.2f} nats per byte, limit "
                           f"{limits.surprise:g}): leave it out, or add --force; the head stays")
    return worst


def read_probes(path: str | Path) -> tuple[Question, ...]:
    """JSONL of {"question", "answers": [...] (or "answer")}. Raises TargetError."""
    return tuple(steps.read_questions(path, None))


def kept_probes(store: Store, parent: Snapshot) -> tuple[Question, ...]:
    """Questions about earlier contexts out of the texts that the lineage kept, evenly chosen; perhaps none."""
    found: list[Question] = []
    for one in store.lineage(parent.id):
        if "texts/questions.jsonl" in one.files:
            for line in store.text(one, "texts/questions.jsonl").splitlines():
                kept = json.loads(line)
                found.append(Question(kept["question"], tuple(kept["answers"]), kept["about"]))
    n = min(KEPT_PROBES, len(found))
    return tuple(found[i * len(found) // n] for i in range(n))


# --- one injection --------------------------------------------------------------------------------------------------


def into_store(store: Store, job: Job, lm: LM, journal: Journal, checkpoints: Checkpoints, first: LM | None = None,
               curvature: Curvature | None = None) -> Snapshot:
    """Train, measure, commit: the snapshot, which is the head now unless the guard refused it.

    lm becomes θ'. first, curvature: as steps.run has them. A job that was committed before a crash is not done again.
    """
    if done := _committed(store, job):
        return done
    if store.head != job.parent:
        raise StoreError(f"the head has moved since this injection began: 'selfparam checkout {store.typed} "
                         f"{job.parent[:12]}' to continue it, or begin again with --restart")
    needed, free = steps.weight_bytes(lm), shutil.disk_usage(store.path).free
    if free < needed:
        raise OutputError(f"a snapshot needs {needed / 1e6:.0f} MB where {free / 1e6:.0f} MB are free: make room")
    parent = store.snapshot(job.parent)
    exams = _exams(job)
    injection, moved = steps.run(lm, job.sets, job.recipe, exams, journal, job.recipe.train == "lora", checkpoints,
                                 first, curvature)
    asked = _asked(exams)
    measured = _measured(store, parent, job, injection, moved, exams, asked)
    wrong = faults(measured, store.limits)
    record = {
        "job": job.id, "base": parent.record["base"], "contexts": _contexts(job.sets, store.keep_texts),
        "recipe": job.recipe.as_dict(), "losses": [x if math.isfinite(x) else None for x in injection.trained.losses],
        "steps": injection.trained.steps, "tokens": injection.trained.tokens,
        "seconds": {"teacher": injection.seconds_teacher, "training": injection.seconds_train},
        "scores": {exam.label: exam.scores() for exam in exams}, "drift": measured.as_dict()["drift"],
        "questions": asked, "versions": steps.versions(),
        "guard": {"faults": wrong, "forced": bool(wrong) and job.force, "limits": store.limits.as_dict(),
                  "measured": measured.as_dict()},
    }
    probe = [s for one in job.sets for s in (*one.related, *one.unrelated)][:_CHECKED]
    with journal.step("writing the snapshot"), store.room() as room:
        _save(lm, room, probe if measured.weights_finite else [], injection.adapter, injection.curvature)
        if store.keep_texts:
            _write_texts(room / "texts", job, exams)
        return store.commit(room, record, parent=parent.id, by="inject")


def _committed(store: Store, job: Job) -> Snapshot | None:
    """The job's snapshot, if a crash came behind its manifest; the head moves where it had not yet."""
    found = next((one for one in store.snapshots() if one.record.get("job") == job.id), None)
    if found and not found.refused and all(move["to"] != found.id for move in store.moves):
        model_folder(store, found)
        store.move_head(found, by="inject", forced=found.forced)
    return found


def _exams(job: Job) -> list[steps.Exam]:
    exams = [steps.training_exam(job.sets)]
    for label, given in (("held-out", job.held_out), ("probes", job.probes)):
        if given:
            exams.append(steps.exam_of(f"{label}: {given[0]}", given[1], job.sets))
    return exams


def _asked(exams: Sequence[steps.Exam]) -> list[list[Any]]:
    """[hash of the question, F1 before, F1 after], for every question asked; no text."""
    return [[content_hash(q.text), qa_f1(before, q.answers), qa_f1(after, q.answers)]
            for exam in exams for q, before, after in zip(exam.questions, exam.before, exam.after, strict=True)]


def _measured(store: Store, parent: Snapshot, job: Job, injection: Any, moved: float, exams: Sequence[steps.Exam],
              asked: Sequence[Sequence[Any]]) -> Measured:
    """What the guard judges. Probes are the last exam where there are any."""
    lm = injection.lm
    finite = all(bool(torch.isfinite(p).all()) for p in lm.model.parameters())
    forgetting = decay = None
    count = len(job.probes[1]) if job.probes else 0
    if count:
        probed = asked[-count:]
        after = sum(one[2] for one in probed) / count
        forgetting = sum(one[1] for one in probed) / count - after
        best: dict[str, float] = {}
        for snapshot in store.lineage(parent.id):
            for name, _, score in snapshot.record.get("questions", []):
                best[name] = max(score, best.get(name, 0.0))
        lost = [best[one[0]] - one[2] for one in probed if one[0] in best]
        decay = sum(lost) / len(lost) if lost else None
    return Measured(
        weights_finite=finite, losses_finite=all(map(math.isfinite, injection.trained.losses)),
        merge_error=injection.merge_error, merge_tolerance=MERGE_TOLERANCE.get(lm.model.dtype, 2e-2), drift=moved,
        surprise=job.surprise, probes=count, forgetting=forgetting, decay=decay,
    )


def _contexts(sets: Sequence[TargetSet], keep_texts: bool) -> list[dict[str, Any]]:
    """Hashes and counts; the name of the file for people, the title only where texts are kept."""
    return [{"id": content_hash(one.context.text), "source": Path(one.context.source).name, "author": one.author,
             "target_set": one.id, "pairs": len(one.related), "unrelated": len(one.unrelated),
             **({"title": one.context.title} if keep_texts else {})} for one in sets]


def _write_texts(folder: Path, job: Job, exams: Sequence[steps.Exam]) -> None:
    folder.mkdir()
    write_sets(folder / "sets.jsonl", job.sets)
    lines = [json.dumps({"question": q.text, "answers": list(q.answers), "about": q.about})
             for exam in exams if not exam.label.startswith("probes") for q in exam.questions]
    (folder / "questions.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")


@contextmanager
def stoppable(checkpoints: Checkpoints) -> Iterator[None]:
    """Ctrl-C and SIGTERM: while it trains, save and stop after the step; else at once. Raises StoppedError."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if checkpoints.stop or not checkpoints.training:
            raise KeyboardInterrupt
        checkpoints.stop = True

    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError(f"stopped: continue with  {checkpoints.advice}") from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


# --- what changed ---------------------------------------------------------------------------------------------------


def difference(store: Store, old: Snapshot, new: Snapshot, questions: Sequence[Question], journal: Journal
               ) -> dict[str, Any]:
    """Drift from `old` to `new` in nats per token, and answers of both where questions are there to ask."""
    lm = load_snapshot(store, old, journal)
    before = reference(lm, [Sentence("", text) for text in packaged("held-out")[: steps.HELD_OUT_PASSAGES]])
    texts = [q.text for q in questions]
    with journal.step("asking the older one"):
        said = lm.answer(texts, max_new_tokens=steps.ANSWER_TOKENS)
    del lm
    lm = load_snapshot(store, new, journal)
    with journal.step("asking the newer one"):
        says = lm.answer(texts, max_new_tokens=steps.ANSWER_TOKENS)
    answers = [{"question": q.text, "answers": list(q.answers), "before": a, "after": b,
                "f1_before": qa_f1(a, q.answers), "f1_after": qa_f1(b, q.answers)}
               for q, a, b in zip(questions, said, says, strict=True)]
    return {"from": old.id, "to": new.id, "drift": drift(before, lm), "asked": len(answers),
            "changed": [one for one in answers if one["before"] != one["after"]],
            "contexts": _added(store, old, new), "recorded": _recorded(old, new)}


def _added(store: Store, old: Snapshot, new: Snapshot) -> list[dict[str, Any]]:
    """Contexts that the newer one has behind it and the older one has not."""
    known = {x["id"] for one in store.lineage(old.id) for x in one.record["contexts"]}
    return [x for one in store.lineage(new.id) for x in one.record["contexts"] if x["id"] not in known]


def _recorded(old: Snapshot, new: Snapshot) -> dict[str, Any]:
    """Mean F1 of the questions that both snapshots were asked, by their hashes."""
    a = {name: after for name, _, after in old.record.get("questions", [])}
    b = {name: after for name, _, after in new.record.get("questions", [])}
    both = sorted(a.keys() & b.keys())
    mean = {key: sum(found[name] for name in both) / len(both) if both else None
            for key, found in (("before", a), ("after", b))}
    return {"questions": len(both), **mean}


def drop_weights(store: Store, journal: Journal) -> list[Snapshot]:
    """Snapshots whose weights can go: all but the head and those whose delta does not make them again."""
    found = []
    for one in store.snapshots():
        if one.id == store.head or one.parent is None:
            continue
        if any(store.rebuildable(one, name) for name in store.missing(one)):
            found.append(one)  # gone already
            continue
        with journal.step(f"making {one.id[:12]} again"):
            if can_drop(store, one):
                found.append(one)
            else:
                journal.note(f"{one.id[:12]} keeps its weights: its delta does not make them again to the bit")
    return found

