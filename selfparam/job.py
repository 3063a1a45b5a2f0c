"""An injection in progress on disk: what it was asked to do, so that `--resume` needs no options and no files.

A folder with sets.jsonl (the target sets), job.json (everything else; written last) and, below it, the checkpoints of
inject/checkpoint.py. It holds texts while it lives and is removed when the injection ends. Refuses to know how an
injection is done. Source: ours.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from selfparam.disk import json_bytes, reason, remove, sha256_of, sync, write_whole
from selfparam.errors import InjectionError, OutputError, StoreError, TargetError
from selfparam.targets import read_sets, write_sets
from selfparam.types import Question, Recipe, TargetSet

_FILE, _SETS = "job.json", "sets.jsonl"


@dataclass(frozen=True)
class Job:
    """One injection. id: a random token; parent: id of the snapshot it starts from ("" outside of stores).

    held_out, probes: questions asked before and after, with the name of their file. surprise: nats per byte of the
    strangest context (None where it was not measured).
    """

    id: str
    model: str
    sets: tuple[TargetSet, ...]
    recipe: Recipe
    parent: str = ""
    held_out: tuple[str, tuple[Question, ...]] | None = None
    probes: tuple[str, tuple[Question, ...]] | None = None
    surprise: float | None = None
    adapter: bool = False
    force: bool = False
    dtype: str = "auto"
    device: str = "auto"
    offline: bool = False


def save_job(folder: Path, job: Job) -> None:
    """Raises OutputError; the job is there when job.json is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _SETS).unlink(missing_ok=True)
        write_sets(folder / _SETS, job.sets)
        sync(folder / _SETS)
        known = asdict(replace(job, sets=()))
        write_whole(folder / _FILE, json_bytes({**known, "sets": sha256_of(folder / _SETS)}))
    except OSError as error:
        raise OutputError(f"cannot write to '{folder}' ({reason(error)}): make room or check its permissions"
                          ) from error


def read_job(folder: Path) -> Job:
    """Raises StoreError where nothing is to be continued, or it is damaged."""
    try:
        known: dict[str, Any] = json.loads((folder / _FILE).read_text("utf-8"))
        if known["sets"] != sha256_of(folder / _SETS):
            raise ValueError("the target sets were altered")
        sets = tuple(read_sets(folder / _SETS))
        asked = {key: _questions(known[key]) for key in ("held_out", "probes")}
        return Job(**{**known, **asked, "sets": sets, "recipe": Recipe(**known["recipe"])})
    except FileNotFoundError as error:
        raise StoreError("no injection is in progress here: run the command again without --resume") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, TargetError, InjectionError,
            RecursionError) as error:
        raise StoreError(f"the injection in progress is damaged ({reason(error)}): begin again with --restart"
                         ) from error


def _questions(given: Any) -> tuple[str, tuple[Question, ...]] | None:
    if given is None:
        return None
    name, questions = given
    return str(name), tuple(Question(q["text"], tuple(q["answers"]), q["about"]) for q in questions)


def drop_job(folder: Path) -> None:
    """Remove it; after a crash halfway there is no job any more. Never raises."""
    remove(folder / _FILE)
    shutil.rmtree(folder, ignore_errors=True)
