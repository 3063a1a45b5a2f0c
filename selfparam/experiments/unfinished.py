"""A cell in progress on disk, so that a table that was interrupted in a long cell goes on inside of it.

One call that absorbs everything has the checkpoints of its injection; a sequence keeps what it is after its steps:

    kept-00000012/weights.safetensors, curvature.safetensors, state.json     θ' after 12 contexts, and its scores so far

Only what answers from its weights is kept: other methods take no time to speak of. Refuses to know protocols.
Source: ours.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from selfparam.disk import json_bytes, reason, sync
from selfparam.errors import ModelError
from selfparam.inject.checkpoint import Checkpoints
from selfparam.inject.curvature import Curvature
from selfparam.lm import LM
from selfparam.methods import Keeping, Memory, Method, Reader, Training
from selfparam.types import Sentence

EVERY = 60.0  # seconds between two


class Unfinished:
    """The folder of one cell. says: takes a line about where it is, or what went wrong without stopping it."""

    def __init__(self, folder: Path, says: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.says = folder, says
        self._saved = time.monotonic()

    def options(self, method: Method) -> dict[str, Any]:
        """For the one call of `absorb` that takes in everything: its checkpoints and progress, where the method trains.
        """
        if not isinstance(method, Training):
            return {}
        last: float | None = None  # the first epoch is timed with all that comes before it

        def progress(epoch: int, epochs: int, loss: float) -> None:
            nonlocal last
            took, last = time.monotonic() - last if last else None, time.monotonic()
            left = "" if took is None else f", about {timedelta(seconds=round(took * (epochs - epoch)))} left of it"
            self.says(f"epoch {epoch} of {epochs}, loss {loss:.3f}{left}")

        return {"checkpoints": Checkpoints(self.folder / "training", every=EVERY, note=self.says), "progress": progress}

    def keep(self, reader: Reader, done: int, scores: dict[str, Any]) -> None:
        """What a sequence is after `done` contexts, if the last time is long enough ago."""
        if not isinstance(reader, Memory) or time.monotonic() - self._saved < EVERY:
            return
        place, beside = self.folder / f"kept-{done:08d}", self.folder / f".{done:08d}.tmp"
        try:
            beside.mkdir(parents=True, exist_ok=True)
            save_model(reader.lm.model, str(beside / "weights.safetensors"))
            state: dict[str, Any] = {"done": done, "scores": scores, "notes": reader.notes,
                                     "storage_tokens": reader.storage_tokens, "kept": None}
            if isinstance(reader, Keeping):
                state["kept"] = [asdict(sentence) for sentence in reader.kept]
                if reader.curvature:
                    reader.curvature.save(beside / "curvature.safetensors")
            (beside / "state.json").write_bytes(json_bytes(state))
            for file in beside.iterdir():
                sync(file)
            beside.rename(place)
            for old in self.folder.glob("kept-*"):
                if old != place:
                    shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            self.says(f"what is done of this cell could not be kept ({reason(error)}): it goes on")
            shutil.rmtree(beside, ignore_errors=True)
        self._saved = time.monotonic()

    def restored(self, lm: LM) -> tuple[Reader, int, dict[str, Any]] | None:
        """The newest that is sound: what answers, contexts it has absorbed, scores so far. lm: θ."""
        for place in sorted(self.folder.glob("kept-*"), reverse=True):
            try:
                state = json.loads((place / "state.json").read_text("utf-8"))
                known = replace(lm, model=copy.deepcopy(lm.model))
                load_model(known.model, place / "weights.safetensors")
                told = known, tuple(state["notes"]), state["storage_tokens"]
                reader = Memory(*told)
                if state["kept"] is not None:
                    held = place / "curvature.safetensors"
                    reader = Keeping(*told, tuple(Sentence(**one) for one in state["kept"]),
                                     Curvature.load(held) if held.exists() else None)
                return reader, int(state["done"]), state["scores"]
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, ModelError, SafetensorError) as error:
                self.says(f"what was done of this cell is damaged ({reason(error)}): it begins again")
        return None

    def drop(self) -> None:
        """The cell is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()  # the last one
