"""Checkpoints of an injection in progress: written at an interval and on request, so that it can be continued.

    teacher.safetensors, teacher.json      the teacher's targets, written once
    step-00000012.safetensors              trained weights, optimiser states, torch's random states
    step-00000012.json                     position, order of rows, losses, hash of the file above; written last

A continued injection takes the steps that the uninterrupted one would have taken, bit for bit on a CPU. The newest two
are kept; a damaged one is passed over. No pickle. Refuses to know target sets, models by name and the command line.
Source: ours.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from selfparam.disk import json_bytes, reason, remove, sha256_of, sync, write_whole
from selfparam.errors import ModelError, OutputError, StoppedError
from selfparam.types import content_hash

KEPT = 2
_STEP = re.compile(r"step-(\d{8})\.json")
Tensors = dict[str, torch.Tensor]


@dataclass
class Position:
    """Where the loop stands. place: steps of this epoch that are done; order: the shuffler's state when it began."""

    epoch: int = 0
    place: int = 0
    step: int = 0
    tokens: int = 0
    total: float = 0.0
    scored: float = 0.0
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    order: Any = None

    def begin_epoch(self, epoch: int, rng: random.Random) -> None:
        self.epoch, self.order = epoch, rng.getstate()

    def end_epoch(self) -> float:
        """The epoch's mean loss, which is kept."""
        self.losses.append(self.total / self.scored)
        self.place, self.total, self.scored = 0, 0.0, 0.0
        return self.losses[-1]


def _some(tensors: Iterable[torch.Tensor]) -> str:
    """Some numbers of each, which say which they are."""
    flat = (t.detach().flatten() for t in tensors)
    return repr([one[:: max(1, one.numel() // 16)].float().tolist() for one in flat])


class Checkpoints:
    """The checkpoints of one injection in a folder of its own.

    every: seconds between two, or ten times what writing the last one took, if that is more. advice: how to continue,
    for the message when it is stopped. note: takes a line for whatever went wrong without stopping the training.
    `stop`: set it (from a signal handler) to save and stop after the step that is running.
    """

    def __init__(self, folder: str | Path, *, every: float = 60.0, advice: str = "",
                 note: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self.every, self.advice, self.note = Path(folder), every, advice, note
        self.stop = self.training = False
        self._took = 0.0
        self._about = ""
        self._saved = time.monotonic()
        self._parts: tuple[Sequence[torch.nn.Parameter], Sequence[torch.optim.Optimizer]] = ((), ())

    # --- the teacher --------------------------------------------------------------------------------------------

    def about(self, model: Any, rows: object, recipe: object, teacher: Any = None,
              held: Mapping[str, torch.Tensor] | None = None, known: object = None) -> None:
        """What is trained, on what, how: checkpoints of anything else are refused. Before everything else.

        teacher: another model than the one that is trained. held: directions of a curvature. known: sentences.
        """
        others = [_some(teacher.parameters()) if teacher else "", _some((held or {}).values()) if held else "",
                  repr(known) if known else ""]
        self._about = content_hash(_some(model.parameters()), repr(rows), repr(recipe), *filter(None, others))

    def teacher(self, make: Callable[[], Tensors]) -> Tensors:
        """The teacher's targets, from the checkpoint where they are sound (mapped, not read), else made and kept."""
        place, says = self.folder / "teacher.safetensors", self.folder / "teacher.json"
        try:
            return self._read(says)[1]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            pass  # not there yet, or damaged: it is made again, the same
        made = make()
        self._try(lambda: self._put(made, place, says, {"about": self._about}))
        return made

    # --- the loop's three calls ---------------------------------------------------------------------------------

    def begin(self, parameters: Sequence[torch.nn.Parameter], optimizers: Sequence[torch.optim.Optimizer],
              rng: random.Random) -> Position:
        """The position to continue from, with weights, optimisers and random states as they were; else the start."""
        self._parts = (parameters, optimizers)
        self._saved = time.monotonic()
        self.training = True
        for says in sorted((path for path in self.folder.glob("step-*.json") if _STEP.fullmatch(path.name)),
                           reverse=True):
            try:
                return self._restored(says, rng)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
                self.note(f"the checkpoint {says.stem} is damaged ({reason(error)}): using the one before it")
        return Position()

    def after_step(self, at: Position, last: bool) -> None:
        """Save where the interval is over, the training done, or somebody wants it to stop (StoppedError)."""
        if self.stop:
            if not self._try(lambda: self._save(at)):
                raise OutputError("stopped, but the checkpoint could not be written: make room and run it again")
            raise StoppedError(f"stopped after step {at.step}, everything is saved: continue with  {self.advice}")
        if last or time.monotonic() - self._saved >= max(self.every, 10 * self._took):
            self._try(lambda: self._save(at))

    def end(self) -> None:
        self.training = False

    # --- files --------------------------------------------------------------------------------------------------

    def _save(self, at: Position) -> None:
        begin, name = time.monotonic(), f"step-{at.step:08d}"
        tensors: Tensors = {"random": torch.get_rng_state()}
        parameters, optimizers = self._parts
        if cuda := self._cuda():
            tensors["random-cuda"] = torch.cuda.get_rng_state(cuda)
        tensors |= {f"weight.{i}": p.detach() for i, p in enumerate(parameters)}
        for k, optimizer in enumerate(optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{k}.{i}.{key}": value for key, value in state.items()}
        says = {"about": self._about, "position": asdict(at)}
        self._put(tensors, self.folder / f"{name}.safetensors", self.folder / f"{name}.json", says)
        for old in sorted(self.folder.glob("step-*.json"))[:-KEPT]:
            remove(old)
            remove(old.with_suffix(".safetensors"))
        self._saved = time.monotonic()
        self._took = self._saved - begin

    def _put(self, tensors: Tensors, place: Path, says: Path, known: dict[str, Any]) -> None:
        """Tensors into `place`, and then what is known about them, with their hash, into `says`."""
        beside = place.with_name(f".{place.name}.tmp")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside)
            sync(beside)
            digest = sha256_of(beside)
            beside.replace(place)
        finally:
            remove(beside)
        known = {**known, "sha256": digest}
        write_whole(says, json_bytes({**known, "check": content_hash(json_bytes(known).decode())}))

    def _try(self, save: Callable[[], None]) -> bool:
        """A checkpoint that cannot be written does not end the training."""
        try:
            save()
            return True
        except (OSError, SafetensorError) as error:
            self.note(f"a checkpoint could not be written to '{self.folder}' ({reason(error)}): training goes on")
            self._saved = time.monotonic()
            return False

    def _read(self, says: Path) -> tuple[dict[str, Any], Tensors]:
        """What is known and the tensors. Raises ValueError and others when damaged, ModelError when foreign."""
        known = json.loads(says.read_text("utf-8"))
        check, place = known.pop("check"), says.with_suffix(".safetensors")
        if check != content_hash(json_bytes(known).decode()) or sha256_of(place) != known["sha256"]:
            raise ValueError("its hash is wrong")
        if known["about"] != self._about:
            raise ModelError(f"the checkpoint in '{self.folder}' belongs to other weights, sentences or settings: "
                             "begin again with --restart")
        return known, load_file(place)

    def _restored(self, says: Path, rng: random.Random) -> Position:
        known, tensors = self._read(says)
        at = Position(**known["position"])
        version, inner, gauss = at.order
        parameters, optimizers = self._parts
        self._fill(tensors, parameters, optimizers)
        rng.setstate((version, tuple(inner), gauss))
        torch.set_rng_state(tensors["random"])
        if (cuda := self._cuda()) and "random-cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random-cuda"], cuda)
        return at

    def _cuda(self) -> torch.device | None:
        """The GPU that is trained on, which may be another than the current one."""
        return next((p.device for p in self._parts[0] if p.is_cuda), None)

    @staticmethod
    @torch.no_grad()
    def _fill(tensors: Tensors, parameters: Sequence[torch.nn.Parameter],
              optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Weights and optimiser states in place. Raises ValueError before anything is changed."""
        if any(tensors[f"weight.{i}"].shape != p.shape for i, p in enumerate(parameters)):
            raise ValueError("its weights have other shapes")
        states: list[dict[int, Tensors]] = [{} for _ in optimizers]
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, which, of, key = name.split(".", 3)
                states[int(which)].setdefault(int(of), {})[key] = value
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for i, p in enumerate(parameters):
            p.copy_(tensors[f"weight.{i}"])
