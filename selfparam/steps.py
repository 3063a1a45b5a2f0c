"""The steps that commands share: contexts -> target sets -> injection -> scores -> record.

Refuses to know options and printing (a Journal is told what happens).
Source: SELF-PARAM, arXiv 2410.00487, section 3; scores as in section 4.1.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from selfparam.contexts import split_context
from selfparam.data.files import json_lines
from selfparam.disk import reason
from selfparam.errors import ModelError, TargetError
from selfparam.inject import Injection, inject, precision
from selfparam.inject.checkpoint import Checkpoints
from selfparam.inject.curvature import Curvature
from selfparam.lm import LM
from selfparam.metrics.drift import drift, reference
from selfparam.metrics.qa_f1 import mean_f1, qa_f1, tokens
from selfparam.own import own_sentences
from selfparam.report import Journal
from selfparam.store.snapshots import is_store
from selfparam.targets import (
    ROUNDS,
    Author,
    EndpointAuthor,
    LocalAuthor,
    Report,
    cached,
    read_pairs,
    read_sets,
    write_pairs,
)
from selfparam.targets.corrections import held_for
from selfparam.targets.files import text_of
from selfparam.targets.rehearsal import add_rehearsed
from selfparam.targets.unrelated import NEIGHBOUR_SHARE, RATIO, add_unrelated, packaged
from selfparam.types import (
    FAST,
    PAPER,
    SMALL,
    SMALL_REHEARSAL,
    SMALL_SEQUENTIAL,
    Context,
    Question,
    Recipe,
    Sentence,
    TargetSet,
)

#: Models below this number of parameters are trained with a SMALL recipe where it is "auto".
FEW_PARAMETERS = 200e6
HELD_OUT_PASSAGES = 60  # unrelated passages on which drift is measured
ASKED_PAIRS = 100  # training pairs that are asked at most
ANSWER_TOKENS = 32
ROOM = 512  # tokens of a window that stay free of the context, at most a third of it


# --- the model and how it is trained ---------------------------------------------------------------------------------


def load(name: str, journal: Journal, *, dtype: str = "auto", device: str = "auto", offline: bool = False) -> LM:
    """LM.load with progress. Raises ModelError, also for a store."""
    if is_store(name):
        raise ModelError(f"'{name}' is a store: write a model of it with 'selfparam export {name} --out DIR', and name "
                         "that")
    with journal.step("loading the model"):
        return LM.load(name, dtype=dtype, device=device, offline=offline)


def choose_recipe(lm: LM, name: str, *, sequence: bool = False, follows: bool = False, **changes: Any) -> Recipe:
    """"paper", "fast", "small", or "auto": by the model's size. Changes that are None are left out.

    sequence: injections go on one upon another, and the curvature of those so far is at hand. follows: something was
    injected before, which a small model rehearses where it is not; nothing is rehearsed without it. Where injections
    do not go on, retention holds what the model itself writes.
    """
    held = sequence and changes.get("retention") != 0
    small = SMALL_SEQUENTIAL if held else SMALL_REHEARSAL if follows else SMALL
    auto = small if lm.parameters < FEW_PARAMETERS else PAPER
    chosen = {"paper": PAPER, "fast": FAST, "small": small, "auto": auto}[name].but(
        **{key: value for key, value in changes.items() if value is not None})
    if chosen.retention and not sequence:
        chosen = chosen.but(known=SMALL_SEQUENTIAL.known)
    return chosen if follows else chosen.but(rehearsal=0)


# --- contexts -> target sets -----------------------------------------------------------------------------------------


def fit(contexts: Sequence[Context], readers: Sequence[LM], journal: Journal) -> list[Context]:
    """Contexts that fit the windows of all readers with room for questions; long ones in pieces, which is noted."""
    found: list[Context] = []
    for x in contexts:
        pieces = [x]
        for lm in readers:
            pieces = [piece for one in pieces for piece in _split(one, lm)]
        if len(pieces) > 1:
            window = min(lm.window for lm in readers)
            journal.note(f"'{x.title or x.source}' is longer than the window of {window} tokens allows: "
                         f"split into {len(pieces)} contexts")
        found += pieces
    return found


def _split(context: Context, lm: LM) -> list[Context]:
    """Pieces that leave room in the window for the longest sentence, or for the author's request and questions."""
    return split_context(context, lm.window - min(ROOM, lm.window // 3), lambda text: len(lm.encode(text)))


def choose_author(lm: LM, name: str, journal: Journal, *, prompt: str | None = None, seed: int = 0,
                  offline: bool = False, endpoint: str | None = None,
                  endpoint_model: str | None = None) -> LocalAuthor | EndpointAuthor:
    """The model itself ("self"), another local one, or an endpoint's. Raises AuthorError and ModelError."""
    if endpoint_model:
        return EndpointAuthor(endpoint_model, endpoint, prompt=prompt or "paper")
    writer = lm if name in ("self", lm.name) else load(name, journal, offline=offline)
    return LocalAuthor(writer, prompt or "brief", seed=seed)


def cache_folder() -> Path:
    """Where written pairs are kept, so that nobody pays for them twice."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "selfparam" / "targets"


def pairs_by(author: Author, contexts: Sequence[Context], pairs: int, journal: Journal,
             cache: Path | None = None, rounds: int = ROUNDS) -> tuple[list[TargetSet], Report]:
    """A target set for each context, without unrelated sentences yet, and all reports in one.

    A context about which nothing usable was written is left out, which is noted. Raises TargetError where that is all.
    """
    try:
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=cache).close()
    except OSError as error:
        journal.note(f"written pairs cannot be kept in '{cache}' ({reason(error)}): going on without")
        cache = None
    with journal.step("writing pairs") as bar:
        if isinstance(author, (LocalAuthor, EndpointAuthor)):
            author.progress = bar

        def make(part: Sequence[Context]) -> list[tuple[tuple[Sentence, ...], Report]]:
            return write_pairs(part, author, pairs=pairs, rounds=rounds, strict=False,
                               progress=lambda kept, wanted: bar.says(f"writing pairs ({kept} of {wanted} kept)"))

        written = make(contexts) if cache is None else cached(cache, contexts, author, pairs, rounds, make)
    barren = [report.nothing for _, report in written if report.nothing]
    if barren and len(barren) == len(written):
        raise TargetError(barren[0])
    for nothing in barren:
        journal.note(f"left out: {nothing}")
    dropped: Counter[str] = Counter()
    for _, report in written:
        dropped.update(report.dropped)
    whole = Report(sum(r.requested for _, r in written), sum(r.kept for _, r in written),
                   max((r.rounds for _, r in written), default=0), dict(dropped))
    reasons = ", ".join(f"{n} {why}" for why, n in dropped.most_common())
    journal.note(f"{whole.kept} pairs of {whole.requested} asked for" + (f" (dropped: {reasons})" if reasons else ""))
    if isinstance(author, EndpointAuthor) and author.usage.requests:
        usage = author.usage
        journal.note(f"{author.model}: {usage.requests} requests, {usage.tokens_in} tokens in, {usage.tokens_out} out")
    about = zip(contexts, written, strict=True)
    return [TargetSet(x, sentences, (), author.id) for x, (sentences, _) in about if sentences], whole


def own_sets(path: str | Path, contexts: Sequence[Context]) -> list[TargetSet]:
    """The target sets of a file; where contexts are given, theirs or those of all their pieces.

    Raises TargetError for a context without a set, or with pieces that do not stand in it.
    """
    sets = read_sets(path)
    found: list[TargetSet] = []
    for x in contexts:
        own = [one for one in sets if one.context.id == x.id][-1:] or [
            one for one in sets if x.source in (one.context.source, one.context.document)]
        pieces = [one.context for one in own if one.context.id != x.id]
        if not own or any(piece.text.removeprefix(f"{piece.title}\n\n") not in x.text for piece in pieces):
            raise TargetError(f"{path}: no target set about '{x.title or x.source}' as it is now: write one with "
                              "'selfparam targets', or leave out the file")
        found += own
    return found if contexts else sets


def written_sets(lm: LM, contexts: Sequence[Context], journal: Journal, *, author: str, prompt: str | None, pairs: int,
                 seed: int, offline: bool, endpoint: str | None, endpoint_model: str | None) -> list[TargetSet]:
    """Contexts, split where they are too long, with pairs by the author: a model, an endpoint, or a JSONL of pairs."""
    if author.endswith(".jsonl") and not endpoint_model:
        pieces = fit(contexts, [lm], journal)
        sets = read_pairs(author, pieces)
        if len(sets) < len(pieces):
            journal.note(f"{len(pieces) - len(sets)} of {len(pieces)} contexts are pieces without a pair: left out")
        return sets
    writer = choose_author(lm, author, journal, prompt=prompt, seed=seed, offline=offline, endpoint=endpoint,
                           endpoint_model=endpoint_model)
    readers = [lm, writer.lm] if isinstance(writer, LocalAuthor) else [lm]
    return pairs_by(writer, fit(contexts, readers, journal), pairs, journal, cache_folder())[0]


def with_unrelated(lm: LM, sets: Sequence[TargetSet], journal: Journal, *, source: str, ratio: float | None,
                   recipe: Recipe) -> list[TargetSet]:
    """Unrelated sentences for those sets that have none.

    ratio: for each pair; None: what measured best, or one for Eq. 2 to the letter, which has no questions about others.
    """
    lacking = [one for one in sets if not one.unrelated]
    if ratio == 0 or not lacking:
        return list(sets)
    if ratio is None:
        ratio = 1.0 if recipe.teacher_sees_x else RATIO / (recipe.unrelated_share if recipe.retention else 1)
    share = 0.0 if recipe.teacher_sees_x else NEIGHBOUR_SHARE
    with journal.step("finding unrelated sentences"):
        added = iter(add_unrelated(lm, lacking, ratio=ratio, neighbour_share=share, source=source, seed=recipe.seed))
    return [one if one.unrelated else next(added) for one in sets]


def lighter(lm: LM, sets: Sequence[TargetSet], recipe: Recipe, journal: Journal) -> Recipe:
    """The recipe, with less retention where a context corrects what the model knows, which is noted."""
    with journal.step("comparing with what the model knows"):
        found, corrections = held_for(lm, sets, recipe)
    for one in corrections:
        journal.note(f"'{one.context.title or one.context.source}' tells some of what the model knows otherwise: "
                     f"what it learned before is held less (retention {found.retention:g})")
    return found


def first_of(history: Sequence[dict[str, Any]], journal: Journal, *, device: str = "auto") -> LM | None:
    """The model before the first injection of a directory's history; None where it is not at hand, which is noted."""
    base = history[0]["base"]
    try:
        first = load(str(base["name"]), journal, dtype=str(base["dtype"]), device=device, offline=True)
        if first.parameters == base["parameters"]:
            return first
    except ModelError:
        pass
    journal.note(f"'{base['name']}' is not at hand to tell what was learned since: rehearsing all that is written")
    return None


def with_rehearsed(lm: LM, sets: Sequence[TargetSet], journal: Journal, recipe: Recipe,
                   first: LM | None = None) -> list[TargetSet]:
    """With sentences that the model writes from memory, for an injection that follows others. first: θ before those."""
    with journal.step("writing from memory"), precision(lm, recipe):
        added, found = add_rehearsed(lm, sets, recipe.rehearsal, first=first,
                                     temperature=recipe.rehearsal_temperature, seed=recipe.seed)
    reasons = ", ".join(f"{n} {why}" for why, n in found.dropped.items())
    journal.note(f"{len(found.sentences)} sentences from memory" + (f" (dropped: {reasons})" if reasons else ""))
    return added


# --- questions -------------------------------------------------------------------------------------------------------


@dataclass
class Exam:
    """Questions with what the model answers. texts: the context of each, None where it is unknown or too long."""

    label: str
    questions: Sequence[Question]
    texts: Sequence[str | None]
    before: list[str] = field(default_factory=list)
    with_context: list[str | None] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def scores(self) -> dict[str, Any]:
        """Mean F1 over contexts of the mean over their questions; None where nothing was answered."""
        return {"questions": len(self.questions), "before": self._mean(self.before),
                "with_context": self._mean(self.with_context), "after": self._mean(self.after)}

    def _mean(self, given: Sequence[str | None]) -> float | None:
        found: dict[str, list[float]] = {}
        for q, answer in zip(self.questions, given, strict=True):
            if answer is not None:
                found.setdefault(q.about or "", []).append(qa_f1(answer, q.answers))
        return mean_f1(found) if found else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, for machines."""
        each = []
        answers = zip(self.questions, self.before, self.with_context, self.after, strict=True)
        for q, before, given, after in answers:
            f1 = {f"f1_{when}": None if answer is None else qa_f1(answer, q.answers)
                  for when, answer in (("before", before), ("with_context", given), ("after", after))}
            each.append({"question": q.text, "answers": list(q.answers), "about": q.about, "before": before,
                         "with_context": given, "after": after, **f1})
        return {"label": self.label, "f1": self.scores(), "questions": each}


def read_questions(path: str | Path, contexts: Sequence[Context] | None) -> list[Question]:
    """JSONL of {"question", "answers": [...] (or "answer")} and perhaps "context": an id, a title or a file's name.

    With one context it may be left out; with None the questions are about nothing in particular.
    Raises TargetError or DataError with file and line.
    """
    found: list[Question] = []
    known = contexts or []
    for line, where in json_lines(path):
        given = line.get("answers", line.get("answer"))
        answers: list[Any] = given if isinstance(given, list) else [given]
        if not answers or any(not isinstance(a, str) or not a.strip() for a in answers):
            raise TargetError(f"{where}: 'answers' is no list of texts: write the right answers into it")
        name = line.get("context", line.get("document")) if contexts is not None else None
        fits = [x.id for x in known if name in (x.id, x.title, x.source, Path(x.source).name)]
        if name is not None and len(fits) != 1:
            raise TargetError(f"{where}: {len(fits)} contexts are called '{name}': give the id, title or file of one")
        about = fits[0] if name is not None else known[0].id if len(known) == 1 else None
        found.append(Question(text_of(line, "question", where), tuple(answers), about))
    return found


def exam_of(label: str, questions: Sequence[Question], sets: Sequence[TargetSet]) -> Exam:
    """The questions with their contexts; one that was split into pieces stays out of the prompt."""
    texts = {one.context.id: one.context.text for one in sets}
    return Exam(label, questions, [texts.get(q.about or "") for q in questions])


def training_exam(sets: Sequence[TargetSet]) -> Exam:
    """The training pairs as questions, at most ASKED_PAIRS of them, evenly chosen."""
    pairs = [Question(s.prompt, (s.completion,), s.about) for one in sets for s in one.related if s.prompt]
    chosen = [pairs[i * len(pairs) // ASKED_PAIRS] for i in range(ASKED_PAIRS)] if len(pairs) > ASKED_PAIRS else pairs
    of = f"{len(chosen)} of the {len(pairs)}" if len(chosen) < len(pairs) else "the"
    return exam_of(f"{of} training pairs", chosen, sets)


def without_questions(sets: Sequence[TargetSet], questions: Sequence[Question],
                      journal: Journal) -> tuple[list[TargetSet], int]:
    """The sets without pairs whose question is one of `questions` (words compared as F1 does), and how many went."""
    asked = {tuple(tokens(q.text)) for q in questions}
    kept = [replace(one, related=tuple(s for s in one.related if tuple(tokens(s.prompt)) not in asked))
            for one in sets]
    gone = sum(len(one.related) for one in sets) - sum(len(one.related) for one in kept)
    if gone:
        journal.note(f"{gone} pairs ask what is asked afterwards: left out of the training")
    return kept, gone


# --- injection -------------------------------------------------------------------------------------------------------


def run(lm: LM, sets: Sequence[TargetSet], recipe: Recipe, exams: Sequence[Exam], journal: Journal,
        adapter: bool = False, checkpoints: Checkpoints | None = None, first: LM | None = None,
        curvature: Curvature | None = None) -> tuple[Injection, float]:
    """Ask, inject in place (lm becomes θ'), ask again; answers go into the exams. Returns the injection and drift.

    first: θ before all injections, where it teaches all but what is rehearsed. curvature: of the injections before;
    where there is none, the model writes what it knows, if the recipe asks for that.
    """
    for exam in exams:
        exam.before = _ask(lm, exam, "asking without the documents", journal)
        exam.with_context = _ask_with_context(lm, exam, journal)
    with journal.step("measuring the model as it is"):
        before = reference(lm, [Sentence("", text) for text in packaged("held-out")[:HELD_OUT_PASSAGES]])
    known: list[Sentence] = []
    if recipe.retention and recipe.known and not curvature:
        with journal.step("writing what it knows"):
            known = own_sentences(lm, recipe)
    with journal.step("reading (teacher)" if recipe.objective == "kl" else "training") as bar:

        def on_teacher(done: int, total: int) -> None:
            bar(done, total)
            if done == total:
                bar.then("training")

        def on_epoch(epoch: int, epochs: int, loss: float) -> None:
            bar(epoch, epochs)
            bar.says(f"training (loss {loss:.3f})")

        done = inject(lm, sets, recipe, teacher=first, curvature=curvature, known=known, progress=on_epoch,
                      teacher_progress=on_teacher, in_place=True, keep_adapter=adapter, checkpoints=checkpoints)
    with journal.step("measuring drift"):
        moved = drift(before, done.lm)
    for exam in exams:
        exam.after = _ask(done.lm, exam, "asking again", journal)
    return done, moved


def _ask(lm: LM, exam: Exam, title: str, journal: Journal) -> list[str]:
    with journal.step(title) as bar:
        return lm.answer([q.text for q in exam.questions], max_new_tokens=ANSWER_TOKENS, progress=bar)


def _ask_with_context(lm: LM, exam: Exam, journal: Journal) -> list[str | None]:
    known = [i for i, text in enumerate(exam.texts) if text is not None]
    found: list[str | None] = [None] * len(exam.texts)
    with journal.step("asking with the documents") as bar:
        given = lm.answer([exam.questions[i].text for i in known], [exam.texts[i] for i in known],
                          max_new_tokens=ANSWER_TOKENS, progress=bar)
    for i, answer in zip(known, given, strict=True):
        found[i] = answer
    return found


# --- the record ------------------------------------------------------------------------------------------------------


def record_of(base: dict[str, Any], sets: Sequence[TargetSet], recipe: Recipe, done: Injection, moved: float,
              exams: Sequence[Exam], history: list[dict[str, Any]]) -> dict[str, Any]:
    """What injection.json holds. Losses and drift in nats per token, times in seconds."""
    contexts = [{
        "id": one.context.id, "title": one.context.title, "source": one.context.source,
        "author": one.author, "target_set": one.id,
        "related": [[s.prompt, s.completion] for s in one.related],
        "unrelated": [[s.prompt, s.completion] for s in one.unrelated],
    } for one in sets]
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "base": base, "contexts": contexts,
        "recipe": recipe.as_dict(), "losses": list(done.trained.losses), "steps": done.trained.steps,
        "tokens": done.trained.tokens, "merge_error": done.merge_error,
        "seconds": {"teacher": done.seconds_teacher, "training": done.seconds_train},
        "scores": {exam.label: exam.scores() for exam in exams}, "drift": moved, "versions": versions(),
        "history": history,
    }


def base_of(lm: LM) -> dict[str, Any]:
    """Which model it is, for the record."""
    dtype = str(lm.model.dtype).removeprefix("torch.")
    return {"name": lm.name, "revision": lm.revision, "parameters": lm.parameters, "dtype": dtype,
            "device": lm.device.type}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("selfparam", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def weight_bytes(lm: LM) -> int:
    return sum(p.numel() * p.element_size() for p in lm.model.parameters())


def peak_memory_mb(device: torch.device) -> float | None:
    """Largest memory of this process so far in MB: the GPU's where the model lies on one, else the main memory's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
