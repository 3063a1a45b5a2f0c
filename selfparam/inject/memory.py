"""Where memory is short: targets go to a file, fewer rows run at once, activations are computed twice.

Refuses to know models, rows and losses by their meaning. Source: the file is safetensors' format
(https://github.com/huggingface/safetensors#format); halving is that of accelerate's find_executable_batch_size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors.torch import load_file

from selfparam.disk import reason
from selfparam.errors import InjectionError, OutputError

#: What the teacher leaves may take so many bytes of memory (the device's, where there is one); more goes to a file.
CACHE_BYTES = 4 << 30
Tensors = dict[str, torch.Tensor]
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}


SMALLER = ("one sentence alone does not fit the memory: use a smaller model, train = lora (with bfloat16 weights), or "
           "a larger device")


def fits(attempt: Callable[[], None], last: bool = False, advice: str = SMALLER) -> bool:
    """Run it; False where memory was too short, which is then free again. last: there is no smaller attempt.

    Raises InjectionError with the advice where the last attempt does not fit.
    """
    try:
        attempt()
        return True
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if last:
            raise InjectionError(advice) from error
    clear_device_cache(garbage_collection=True)
    return False


class Micro:
    """How many tokens run at once, found by trying: the whole step, then halves; their gradients add up to the step's.

    Where one row alone does not fit, activations are computed again in the backward pass (gradient checkpointing), and
    the search begins anew.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.tokens, self.recompute = model, 0, False

    def parts(self, sizes: Sequence[int]) -> list[slice]:
        """Rows of these sizes (tokens), in their order, cut into runs of at most `tokens`, at least one row each."""
        found, at, filled = [], 0, 0
        for i, size in enumerate(sizes):
            if self.tokens and i > at and filled + size > self.tokens:
                found.append(slice(at, i))
                at, filled = i, 0
            filled += size
        return [*found, slice(at, len(sizes))]

    def run(self, sizes: Sequence[int], one: Callable[[slice], None], undo: Callable[[], None]) -> None:
        """`one` for every part of the rows; where memory is short all is undone, parts shrink, and it begins again.

        Raises InjectionError where nothing helps.
        """
        while True:
            parts = self.parts(sizes)
            alone = len(parts) == len(sizes)

            def attempt(parts: Sequence[slice] = parts) -> None:
                for part in parts:
                    one(part)

            if fits(attempt, last=alone and self.recompute):
                return
            undo()
            if alone:
                self.tokens, self.recompute = 0, True
                self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            else:
                largest = max(sum(sizes[part]) for part in parts)  # one row may be longer than the limit
                self.tokens = min(self.tokens or largest, largest) // 2

    def at_once(self, attempt: Callable[[], None]) -> None:
        """Where several processes must do the same, none of them can try smaller parts. Raises InjectionError."""
        fits(attempt, last=True, advice="a step does not fit the memory of a device: use a smaller batch_tokens")

    def end(self) -> None:
        """The model as it was."""
        if self.recompute:
            self.model.activation_checkpointing_disable()


class Kept:
    """Tensors [total, …] that are filled part by part: on the device, or beyond `budget` bytes in a file.

    The file lies in the folder for temporary files (TMPDIR), is mapped into memory when it is full, and is gone with
    this object: a context manager, so also after an error or Ctrl-C; on POSIX even when the process is killed later.
    """

    def __init__(self, device: torch.device, budget: int = CACHE_BYTES) -> None:
        self.device, self.budget = device, budget
        self._held: Tensors = {}
        self._file: FileIO | None = None
        self._path = Path()
        self._begins: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def in_file(self) -> bool:
        return self._file is not None

    def reserve(self, total: int, one: Tensors) -> None:
        """Room for `total` places that each look like the one of `one` [1, …]; zeros. Raises OutputError."""
        if total * sum(t.nbytes for t in one.values()) <= self.budget:
            self._held = {name: t.new_zeros(total, *t.shape[1:], device=self.device) for name, t in one.items()}
            return
        says: dict[str, Any] = {}
        at = 0
        for name, t in one.items():
            end = at + total * t.nbytes
            says[name] = {"dtype": _NAMES[t.dtype], "shape": [total, *t.shape[1:]], "data_offsets": [at, end]}
            at = end
        text = json.dumps(says).encode()
        text += b" " * (-len(text) % 8)
        self._begins = {name: 8 + len(text) + says[name]["data_offsets"][0] for name in one}
        folder = TemporaryDirectory(prefix="selfparam-", ignore_cleanup_errors=True)
        try:
            self._path = Path(self._stack.enter_context(folder)) / "teacher.safetensors"
            self._file = self._stack.enter_context(self._path.open("wb", buffering=0))
        except OSError as error:
            raise _full(error) from error
        self._write(0, len(text).to_bytes(8, "little") + text)

    def put(self, at: int, part: Tensors) -> None:
        """Places [at, at + n) of every tensor. Raises OutputError."""
        for name, tensor in part.items():
            if self._file is None:
                self._held[name][at : at + len(tensor)] = tensor
            else:
                flat = tensor.detach().cpu().contiguous()
                self._write(self._begins[name] + at * flat[:1].nbytes, flat.view(torch.uint8).numpy().tobytes())

    def tensors(self) -> Tensors:
        """All of them, complete; those of a file are mapped, not read. Raises OutputError."""
        if self._file is None:
            return self._held
        try:
            self._file.close()
        except OSError as error:
            raise _full(error) from error
        mapped = load_file(self._path)
        if os.name == "posix":
            self._path.unlink()  # the mapping stays; other systems remove the file when this object ends
        return mapped

    def placed(self, tensors: Tensors) -> Tensors:
        """The same on the device where the budget allows it, else where they are."""
        if sum(t.nbytes for t in tensors.values()) > self.budget:
            return tensors
        return {name: t.to(self.device) for name, t in tensors.items()}

    def _write(self, at: int, data: bytes) -> None:
        assert self._file is not None
        left = memoryview(data)
        try:
            self._file.seek(at)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise _full(error) from error


def _full(error: OSError) -> OutputError:
    return OutputError(f"the teacher's targets do not fit into '{gettempdir()}' ({reason(error)}): make room, set "
                       "TMPDIR to a larger disk, or keep less of them (top_k)")
