"""Snapshots as models: load one, make dropped weights again of parent and delta, export to directories and formats.

Refuses to know training. Torch and peft are imported when they are needed.
Source: LoRA, arXiv 2106.09685 (W + s·BA); peft's adapter layout; llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfparam.disk import reason, sha256_of, sync, write_whole
from selfparam.errors import OutputError, StoreError
from selfparam.store.directory import check_out
from selfparam.store.snapshots import Snapshot, Store

if TYPE_CHECKING:
    import torch

ADAPTER, ADAPTER_CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
CONVERTER = "convert_hf_to_gguf.py"


def model_folder(store: Store, snapshot: Snapshot) -> Path:
    """A directory that transformers loads; weights that gc dropped are made again and must have their old hash.

    Raises StoreError where that cannot be done.
    """
    lost = [name for name in store.missing(snapshot) if name in snapshot.part("")]
    if not lost:
        return store.view(snapshot)
    if not all(store.rebuildable(snapshot, name) for name in lost) or ADAPTER in store.missing(snapshot):
        raise StoreError(f"'{lost[0]}' of snapshot {snapshot.id[:12]} is missing and cannot be made again: "
                         "restore the store from a copy")
    parent = model_folder(store, store.snapshot(str(snapshot.parent)))
    with store.writing(), store.room() as room:
        _merged(store, snapshot, parent, room)
        if still := [name for name in store.adopt(room, snapshot) if name in lost]:
            raise StoreError(
                f"'{still[0]}' of snapshot {snapshot.id[:12]} was made again and is not what it was to the bit "
                "(another processor or library version?): do it where the snapshot was made, or restore a copy"
            )
    return store.view(snapshot)


def _merged(store: Store, snapshot: Snapshot, parent: Path, room: Path) -> None:
    """Write the parent's model with the snapshot's delta merged into it to `room`."""
    from peft import PeftModel

    from selfparam.lm import LM

    _links(store, snapshot.part("adapter"), room)
    lm = LM.load(str(parent), dtype=_dtype(snapshot), device=_device(snapshot), offline=True)
    lm.model = PeftModel.from_pretrained(lm.model, str(room / "adapter")).merge_and_unload()
    lm.save(room)


def _dtype(snapshot: Snapshot) -> str:
    return str(snapshot.record["base"]["dtype"])


def _device(snapshot: Snapshot) -> str:
    import torch

    wanted = str(snapshot.record["base"]["device"])
    return wanted if wanted != "cuda" or torch.cuda.is_available() else "cpu"


def _links(store: Store, files: dict[str, tuple[str, int]], folder: Path) -> None:
    for name, (sha, _) in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(store.object(sha))


def can_drop(store: Store, snapshot: Snapshot) -> bool:
    """Whether the snapshot's weights, made again of its delta here and now, have the very hash they had."""
    lost = [name for name in snapshot.part("") if store.rebuildable(snapshot, name)]
    if not lost or any(name.startswith("adapter/") for name in store.missing(snapshot)):
        return False
    parent = model_folder(store, store.snapshot(str(snapshot.parent)))
    with store.writing(), store.room() as room:
        _merged(store, snapshot, parent, room)
        return all((room / name).is_file() and sha256_of(room / name) == snapshot.files[name][0] for name in lost)


# --- export ---------------------------------------------------------------------------------------------------------


@contextmanager
def _place(out: str | Path, *, file: bool = False) -> Iterator[Path]:
    """Something beside `out` to write to, renamed to it when the block ends well. Raises OutputError."""
    check_out(out, file=file)
    home = Path(out).resolve()
    beside = home.with_name(f".{home.name}.{secrets.token_hex(4)}.tmp")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        if not file:
            beside.mkdir()
        yield beside
        for path in (beside, *beside.rglob("*")):
            sync(path)
        if home.is_dir() and not file:
            home.rmdir()
        beside.rename(home)
        sync(home.parent)
    except OSError as error:
        raise OutputError(f"cannot write '{out}' ({reason(error)}): make room or choose another place") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if file:
            beside.unlink(missing_ok=True)


def export_model(store: Store, snapshot: Snapshot, out: str | Path) -> int:
    """An ordinary model directory; every file is checked against its hash on the way. Returns its bytes."""
    source = model_folder(store, snapshot)
    files = snapshot.part("")
    with _place(out) as folder:
        for name, (sha, _) in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
            if sha256_of(folder / name) != sha:
                raise StoreError(f"'{name}' of snapshot {snapshot.id[:12]} was altered: "
                                 "run 'selfparam verify', and restore it from a copy")
    return sum(size for _, size in files.values())


def export_adapter(store: Store, snapshot: Snapshot, out: str | Path) -> int:
    """All deltas from the first snapshot to this one as one peft adapter of the base: ranks side by side.

    Σ s_i·B_i·A_i = [s_1·B_1 … s_n·B_n]·[A_1; …; A_n]. Returns its rank. Raises StoreError where there is none.
    """
    from safetensors.torch import save_file

    chain = [one for one in store.lineage(snapshot.id) if one.parent is not None]
    if not chain or not all(one.part("adapter") for one in chain):
        raise StoreError(f"snapshot {snapshot.id[:12]} is no sum of LoRA deltas: export it with --format hf")
    config: dict[str, Any] = {}
    parts: list[dict[str, torch.Tensor]] = []
    modules: set[str] = set()
    for one in chain:
        config = json.loads(store.text(one, ADAPTER_CONFIG))
        if config.get("target_parameters"):
            raise StoreError("the deltas of experts cannot be put side by side: export with --format hf")
        parts.append(_scaled(store, one, float(config["lora_alpha"]) / float(config["r"])))
        modules |= set(config["target_modules"])
    joined = _joined(parts)
    rank = next(weight.shape[0] for name, weight in joined.items() if ".lora_A." in name)
    config |= {"r": rank, "lora_alpha": rank, "target_modules": sorted(modules), "base_model_name_or_path":
               chain[0].record["base"]["name"]}
    with _place(out) as folder:
        save_file(joined, folder / "adapter_model.safetensors", {"format": "pt"})
        write_whole(folder / "adapter_config.json", (json.dumps(config, indent=1) + "\n").encode())
    return rank


def _scaled(store: Store, snapshot: Snapshot, scale: float) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(store.sound(snapshot, ADAPTER))
    except SafetensorError as error:
        raise StoreError(f"'{ADAPTER}' of snapshot {snapshot.id[:12]} is damaged ({reason(error)}): "
                         "restore it from a copy") from error
    return {name: weight * scale if ".lora_B." in name else weight for name, weight in weights.items()}


def _joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A [r_i, in] below one another, B [out, r_i] beside one another; a delta without a module counts as none."""
    import torch

    if any(set(part) != set(parts[0]) for part in parts):
        raise StoreError("the deltas train different modules: export with --format hf")
    return {name: torch.cat([part[name] for part in parts], dim=0 if ".lora_A." in name else 1).contiguous()
            for name in parts[0]}


def export_gguf(store: Store, snapshot: Snapshot, out: str | Path, converter: str | None = None) -> int:
    """A GGUF file by llama.cpp's own converter, where the user has it. Returns its bytes."""
    program = converter or shutil.which(CONVERTER)
    if not program or not Path(program).is_file():
        raise StoreError(f"GGUF needs {CONVERTER} of llama.cpp: clone it, pip install its requirements, "
                         f"and add --converter PATH/TO/{CONVERTER}")
    source = model_folder(store, snapshot)
    with _place(out, file=True) as file:
        done = subprocess.run([sys.executable, program, str(source), "--outfile", str(file)],
                              capture_output=True, text=True, errors="replace")
        if done.returncode or not file.is_file():
            said = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
            raise StoreError(f"{CONVERTER} failed ({said[:200]}): it may not know this architecture")
        return file.stat().st_size

