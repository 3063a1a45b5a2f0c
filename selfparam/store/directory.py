"""A model directory with its history: written beside its place, loaded again, compared, and only then renamed.

`injection.json` in it says what was injected, when and how well; README.md says the same to people. Refuses to know how
the weights came about, and the command line. Source: DESIGN ("merged = trained = reloaded"); the layout is ours.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from selfparam.disk import reason, remove, sync
from selfparam.errors import ModelError, OutputError, SelfParamError, VerificationError
from selfparam.types import Sentence

if TYPE_CHECKING:
    import torch

    from selfparam.lm import LM

RECORD = "injection.json"
#: What every injection.json has, and the type of each.
KEYS: dict[str, type] = {
    "created": str, "base": dict, "contexts": list, "recipe": dict, "scores": dict, "drift": float, "history": list,
}
#: Largest mean KL (nats per token) between the weights in memory and those read back: float32, and shorter types.
TOLERANCE_FLOAT32, TOLERANCE = 1e-4, 2e-2


# --- before the work ------------------------------------------------------------------------------------------------


def check_out(out: str | Path, *, needed: int = 0, file: bool = False) -> None:
    """Raise OutputError unless `out`, a folder (or file), can be made: free, writable, with `needed` bytes of space.

    An empty folder is free. Writes and removes an empty folder in the nearest folder that exists.
    """
    path, kind = Path(out), "file" if file else "folder"
    try:
        if path.is_dir() and not file:
            if any(path.iterdir()):
                raise OutputError(f"'{out}' exists and is not empty: choose another folder")
            if path.samefile("."):
                raise OutputError(f"'{out}' is the folder you are in: choose a new one inside it")
            if path.is_mount():
                raise OutputError(f"'{out}' is a mount point: choose a new folder inside it")
        elif os.path.lexists(path):
            raise OutputError(f"'{out}' exists: choose another {kind}")
        home = path.absolute().parent
        while not home.exists():
            home = home.parent
        with tempfile.TemporaryDirectory(prefix=".selfparam-", dir=home):
            free = shutil.disk_usage(home).free
    except OSError as error:
        raise OutputError(f"cannot write to '{out}' ({reason(error)}): choose another {kind}") from error
    if free < needed:
        raise OutputError(f"'{out}' needs {needed / 1e6:.0f} MB where {free / 1e6:.0f} MB are free: "
                          f"make room or choose another {kind}")


def unfinished_beside(out: str | Path) -> Path:
    """Where the checkpoints of an injection into `out` live: a hidden folder beside it."""
    path = Path(out).resolve()
    return path.with_name(f".{path.name}.injection")


def drop_remains(place: Path) -> None:
    """Remove what a crash left of an injection that was being dropped: the texts of one that is no more."""
    if place.is_dir() and not (place / "job.json").exists():
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def writing_beside(out: str | Path) -> Iterator[None]:
    """Hold the lock of the injection into `out`, which is gone afterwards. Raises OutputError where another has it."""
    place = unfinished_beside(out)
    new = [folder for folder in place.parents if not folder.exists()]
    path = place.with_suffix(".lock")
    lock = FileLock(path, fallback_to_soft=False)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.2)
    except Timeout as error:
        raise OutputError(f"another process is injecting into '{out}': wait until it has finished, or choose another "
                          "folder") from error
    except OSError as error:
        raise OutputError(f"cannot write to '{out}' ({reason(error)}): choose another folder") from error
    drop_remains(place)
    try:
        yield
    finally:
        remove(path)  # while it is held: who waits for it sees that it is gone, and makes a new one
        lock.release()
        with suppress(OSError):  # unless something was written
            for folder in new:
                folder.rmdir()


# --- writing --------------------------------------------------------------------------------------------------------


def write_model(out: str | Path, lm: LM, record: dict[str, Any], probe: Sequence[Sentence], *,
                adapter: tuple[Any, dict[str, torch.Tensor]] | None = None,
                progress: Callable[[int, int], None] | None = None) -> int:
    """Write a directory that AutoModelForCausalLM loads, whole or not at all. Returns its size in bytes.

    The weights keep the type they have in memory. Before the rename the directory is loaded again and compared with
    `lm` on the sentences of `probe`. adapter: peft's configuration and LoRA weights, written to `adapter/`.
    Raises OutputError (exists, read-only, disk full) and VerificationError (the reloaded weights say something else).
    """
    check_out(out)
    path = Path(out).resolve()
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    report = progress or (lambda done, total: None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        lm.save(beside)
        if adapter:
            write_adapter(beside / "adapter", *adapter)
        (beside / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", "utf-8")
        (beside / "README.md").write_text(model_card(record), "utf-8")
        report(1, 3)
        verify_reload(beside, lm, probe)
        report(2, 3)
        size = _settle(beside)
        if path.is_dir():
            path.rmdir()
        beside.rename(path)
        with suppress(OSError):
            sync(path.parent)
    except SelfParamError:
        raise
    except Exception as error:  # safetensors and transformers raise kinds of their own; the user needs one line
        raise OutputError(f"cannot write the model to '{out}' ({reason(error)}): "
                          "make room or choose another folder") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    report(3, 3)
    return size


def write_adapter(folder: Path, config: Any, weights: dict[str, torch.Tensor]) -> None:
    """The LoRA weights alone, as PeftModel.from_pretrained(base, folder) reads them."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = deepcopy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def verify_reload(folder: Path, lm: LM, probe: Sequence[Sentence]) -> None:
    """VerificationError unless the directory, loaded again, gives the logits that `lm` gives."""
    from selfparam.lm import LM
    from selfparam.metrics.drift import drift, reference

    dtype = str(lm.model.dtype).removeprefix("torch.")
    again = LM.load(str(folder), dtype=dtype, device=str(lm.device), offline=True)
    found = drift(reference(lm, probe), again)
    limit = TOLERANCE_FLOAT32 if dtype == "float32" else TOLERANCE
    if not found <= limit:
        raise VerificationError(
            f"the weights read back from disk differ by {found:.2g} nats per token (limit {limit:g}), so nothing was "
            "kept: look at the disk, or train with a smaller learning rate"
        )


def _settle(folder: Path) -> int:
    """Give all files the mode of an ordinary one (safetensors makes private ones), flush them; their bytes."""
    mode = (folder / RECORD).stat().st_mode & 0o777
    size = 0
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            path.chmod(mode)
            size += path.stat().st_size
        sync(path)
    sync(folder)
    return size


# --- reading --------------------------------------------------------------------------------------------------------


def read_record(folder: str | Path) -> dict[str, Any]:
    """What injection.json in a model directory says. Raises ModelError when it is missing or damaged."""
    path = Path(folder) / RECORD
    if not Path(folder).is_dir():
        raise ModelError(f"no folder '{folder}': give a folder that 'selfparam inject' wrote")
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"'{folder}' has no {RECORD}: give a folder that 'selfparam inject' wrote") from error
    except OSError as error:
        raise ModelError(f"cannot read '{path}' ({reason(error)}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' is damaged ({reason(error)}): restore it from a copy") from error
    wrong = [key for key, kind in KEYS.items() if not isinstance(record, dict) or not isinstance(record.get(key), kind)]
    if wrong:
        raise ModelError(f"'{path}' is damaged ('{wrong[0]}' is missing or of another kind): restore it from a copy")
    return dict(record)


def history_of(model: str) -> list[dict[str, Any]]:
    """The injections that a model has behind it, oldest first, in short; none where it is no folder of ours.

    Raises ModelError where its injection.json is damaged.
    """
    if not (Path(model) / RECORD).exists():
        return []
    record = read_record(model)
    last = {key: record[key] for key in ("created", "base", "scores", "drift")}
    last["contexts"] = [{key: x.get(key, "") for key in ("id", "title", "source")} for x in record["contexts"]]
    return [*record["history"], last]


# --- for people -----------------------------------------------------------------------------------------------------


def model_card(record: dict[str, Any]) -> str:
    """README.md of the directory (markdown with the hub's front matter)."""
    name, contexts = record["base"]["name"], record["contexts"]
    on_hub = name.count("/") == 1 and not Path(name).exists()
    base = f"base_model: {json.dumps(name)}\n" if on_hub else ""
    sources = [f"| {_cell(x['title'] or x['source'])} | {x['id']} | {len(x['related'])} | {_cell(x['author'])} |"
               for x in contexts]
    scores = [f"| {_cell(label)} | {s['questions']} | " + " | ".join(number(s[key]) for key in _SCORES) + " |"
              for label, s in record["scores"].items()]
    earlier = "; ".join(f"{one['created'][:10]}: {len(one['contexts'])} context(s)" for one in record["history"])
    return _CARD.format(
        base=base, name=_cell(name), count=len(contexts), day=record["created"][:10], sources="\n".join(sources),
        scores="\n".join(scores), drift=record["drift"], earlier=f"\nInjected earlier: {earlier}.\n" if earlier else "",
        recipe=", ".join(f"{key} {value}" for key, value in record["recipe"].items()),
    )


_SCORES = ("before", "with_context", "after")
_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [selfparam]
{base}---

# A model with contexts in its weights

[SELF-PARAM](https://arxiv.org/abs/2410.00487) wrote {count} context(s) into the weights of `{name}` on {day}. The model
answers questions about them without having them in front.

| context | id | pairs | written by |
| --- | --- | --- | --- |
{sources}

| mean F1 on | questions | before | with the context in the prompt | after |
| --- | --- | --- | --- | --- |
{scores}

Drift on held-out unrelated text: {drift:.4f} nats per token (mean KL from the base).

Recipe: {recipe}.
{earlier}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```

`selfparam ask path/of/this/folder "…"` asks it, `selfparam inspect path/of/this/folder` shows `injection.json`.
"""


def number(score: float | None, digits: int = 2) -> str:
    """A score as text; a dash where it was not measured."""
    return "-" if score is None else f"{score:.{digits}f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("`", "'").split())
