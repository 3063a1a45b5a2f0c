"""The commands of stores: init, log, diff, checkout, rollback, export, verify, gc (inject is in cli/__init__.py).

Torch is imported inside commands that need it. Refuses to know how anything is computed and how files are laid out.
Source: the words are git's.
"""

from __future__ import annotations

import json
import math
import sys
from shlex import quote
from typing import Annotated, Any, Literal

import typer

from selfparam.errors import RefusedError, StoreError
from selfparam.report import Journal, answers_changed, log_table, output, plain
from selfparam.store.guard import Limits
from selfparam.store.snapshots import Store

StorePath = Annotated[str, typer.Argument(metavar="STORE", help="A folder that 'selfparam init' made.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines and nothing else.")]
Name = Annotated[str, typer.Argument(metavar="[SNAPSHOT]", help="First digits of an id; default: the head.")]
_DEFAULT = Limits()


def finite(value: float | None) -> float | None:
    """The number of an option. Raises BadParameter for inf and nan."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number: give one")
    return value


def init(
    path: Annotated[str, typer.Argument(metavar="STORE", help="Folder to make; it must be new or empty.")],
    model: Annotated[str, typer.Option(help="'embedded', a Hugging Face model directory, or a hub name.")],
    keep_texts: Annotated[bool, typer.Option(
        "--keep-texts", help="Keep documents and questions in the store, so that the guard can ask about earlier ones; "
                             "otherwise only their hashes are kept.")] = False,
    max_drift: Annotated[float, typer.Option(
        min=0.0, callback=finite,
        help="Guard: nats per token that unrelated text may move.")] = _DEFAULT.drift,
    max_forgetting: Annotated[float, typer.Option(
        min=0.0, callback=finite,
        help="Guard: F1 that earlier documents may lose in one update.")] = _DEFAULT.forgetting,
    max_decay: Annotated[float, typer.Option(
        min=0.0, callback=finite,
        help="Guard: F1 that they may lose against their best score.")] = _DEFAULT.decay,
    max_surprise: Annotated[float, typer.Option(
        min=0.0, callback=finite,
        help="Guard: nats per byte of a document; random characters have over 3.")] = _DEFAULT.surprise,
    offline: Annotated[bool, typer.Option("--offline", help="Refuse everything that needs the network.")] = False,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Type of the weights.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    machine: Json = False,
) -> None:
    """Make a store: a folder of snapshots of one model that learns. The limits can be edited in its store.json later.

    Example: selfparam init my-store --model embedded
    """
    from selfparam import learn, steps
    from selfparam.store import check_out

    journal = Journal(machine)
    check_out(path)
    lm = steps.load(model, journal, dtype=dtype, device=device, offline=offline)
    with journal.step("writing the first snapshot"):
        snapshot = learn.begin_store(path, lm, limits=Limits(max_drift, max_forgetting, max_decay, max_surprise),
                                     keep_texts=keep_texts)
    _say(machine, {"store": path, "head": snapshot.id},
         f"made: {plain(path)} (head {snapshot.id[:12]})\nteach it: selfparam inject {plain(quote(path))} notes.txt")


def log(
    path: StorePath,
    everything: Annotated[bool, typer.Option(
        "--all", help="Also snapshots that are not behind the head: refused or rolled back.")] = False,
    machine: Json = False,
) -> None:
    """Show the lineage, newest first: what was injected, scores before and after, drift, what the guard said.

    Example: selfparam log my-store
    """
    store = Store.open(path)
    line = store.lineage()
    shown = store.snapshots() if everything else line
    if machine:
        behind = {one.id for one in line}
        _print([{"id": one.id, "parent": one.parent, "created": one.created, "head": one.id == store.head,
                 "in_lineage": one.id in behind, "refused": one.refused, "forced": one.forced,
                 **{key: one.record.get(key) for key in ("contexts", "scores", "drift", "guard")}} for one in shown])
        return
    output().print(log_table(shown[::-1], store.head or "", {one.id for one in line}))


def diff(
    path: StorePath,
    old: Annotated[str, typer.Argument(metavar="A", help="First digits of a snapshot's id.")],
    new: Annotated[str, typer.Argument(metavar="[B]", help="Another; default: the head.")] = "",
    questions: Annotated[str | None, typer.Option(
        help='Questions to ask both: .jsonl of {"question", "answers"}; default: those that the store kept.')] = None,
    machine: Json = False,
) -> None:
    """Show what B has learned since A: documents, drift, and the questions whose answers changed.

    Example: selfparam diff my-store 3f2a --questions exam.jsonl
    """
    from selfparam import learn

    journal, store = Journal(machine), Store.open(path)
    a, b = store.find(old), store.find(new)
    asked = learn.read_probes(questions) if questions else learn.kept_probes(store, b)
    found = learn.difference(store, a, b, asked, journal)
    if machine:
        _print(found)
        return
    sources = ", ".join(plain(x["source"] or x["id"]) for x in found["contexts"]) or "nothing"
    console, recorded = output(), found["recorded"]
    console.print(f"{a.id[:12]} → {b.id[:12]}: learned {sources}", soft_wrap=True)
    console.print(f"drift: {found['drift']:.4f} nats per token (mean KL on held-out unrelated text)")
    if recorded["questions"]:
        console.print(f"recorded F1 of the {recorded['questions']} questions both were asked: "
                      f"{recorded['before']:.2f} → {recorded['after']:.2f}")
    if asked:
        console.print(f"{len(found['changed'])} of {found['asked']} answers changed", answers_changed(found["changed"]))
    else:
        console.print("no questions were kept: add --questions FILE to compare answers")


def checkout(
    path: StorePath,
    name: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="First digits of its id ('selfparam log --all').")],
    force: Annotated[bool, typer.Option(
        "--force", help="Also one that the guard refused; that is recorded.")] = False,
    machine: Json = False,
) -> None:
    """Make any snapshot of the store the head. Nothing is removed.

    Example: selfparam checkout my-store 3f2a
    """
    _move(Store.open(path), name, "checkout", force, machine)


def rollback(
    path: StorePath,
    count: Annotated[int, typer.Option("--steps", min=1, help="How many snapshots to go back.")] = 1,
    machine: Json = False,
) -> None:
    """Make the parent of the head the head: the last update is undone, and can be had back with checkout.

    Example: selfparam rollback my-store
    """
    store = Store.open(path)
    line = store.lineage()
    if len(line) <= count:
        raise StoreError(f"only {len(line) - 1} snapshot(s) lie behind the head: roll back fewer")
    _move(store, line[-1 - count].id, "rollback", True, machine)


def _move(store: Store, name: str, by: str, force: bool, machine: bool) -> None:
    from selfparam.store.weights import model_folder

    snapshot = store.find(name)
    if snapshot.refused and not force:
        raise RefusedError(f"the guard refused {snapshot.id[:12]} ({'; '.join(snapshot.faults)}): add --force to make "
                           "it the head all the same")
    with store.writing():
        before = store.head
        model_folder(store, snapshot)
        if before != snapshot.id:
            store.move_head(snapshot, by=by, forced=snapshot.refused)
    _say(machine, {"head": snapshot.id, "before": before},
         f"head: {snapshot.id[:12]} (before: {str(before)[:12]}, which stays in the store)")


def export(
    path: StorePath,
    out: Annotated[str, typer.Option(help="Folder (gguf: file) to write; it must be new.")],
    name: Name = "",
    kind: Annotated[Literal["hf", "adapter", "gguf"], typer.Option(
        "--format", help="hf: a model directory; adapter: all that was learned as one LoRA of the base, as peft reads "
                         "it; gguf: by llama.cpp's converter.")] = "hf",
    converter: Annotated[str | None, typer.Option(help="Path of llama.cpp's convert_hf_to_gguf.py.")] = None,
    machine: Json = False,
) -> None:
    """Write a snapshot for other programs.

    Example: selfparam export my-store --out my-model
    """
    from selfparam.store.weights import export_adapter, export_gguf, export_model

    if converter and kind != "gguf":
        raise typer.BadParameter("--converter is for GGUF: leave it out, or add --format gguf")
    store = Store.open(path)
    snapshot = store.find(name)
    if kind == "adapter":
        said = f"rank {export_adapter(store, snapshot, out)}"
    else:
        size = export_model(store, snapshot, out) if kind == "hf" else export_gguf(store, snapshot, out, converter)
        said = f"{size / 1e6:.0f} MB"
    _say(machine, {"snapshot": snapshot.id, "out": out, "format": kind}, f"written: {plain(out)} ({said})")


def verify(path: StorePath, machine: Json = False) -> None:
    """Check every hash, the lineage and the head. Reads every byte.

    Example: selfparam verify my-store
    """
    store = Store.open(path)
    found = store.verify()
    if machine:
        _print({"snapshots": len(store.ids()), "faults": found})
    elif found:
        output().print("\n".join(map(plain, found)), soft_wrap=True)
    if found:
        raise StoreError(f"{len(found)} fault(s) in '{path}': restore what is named from a copy")
    if not machine:
        output().print(f"sound: {len(store.ids())} snapshot(s), every hash as recorded")


def gc(
    path: StorePath,
    everything: Annotated[bool, typer.Option(
        "--all", help="Also remove snapshots that are not behind the head: refused or rolled back. They are lost.")
    ] = False,
    deltas: Annotated[bool, typer.Option(
        "--deltas", help="Keep earlier snapshots as LoRA deltas only, without curvature, where making the weights "
                         "again gives the same bits on this machine (tried for each).")] = False,
    machine: Json = False,
) -> None:
    """Free space: leavings of crashes and files that no snapshot needs.

    Example: selfparam gc my-store --deltas
    """
    journal, store = Journal(machine), Store.open(path)
    with store.writing():
        if deltas:
            from selfparam.learn import drop_weights

            freed = store.gc(everything=everything, weights=drop_weights(store, journal))
        else:
            freed = store.gc(everything=everything)
    _say(machine, {"snapshots": freed.snapshots, "files": freed.files, "bytes": freed.bytes},
         f"removed: {freed.snapshots} snapshot(s), {freed.files} file(s), {freed.bytes / 1e6:.1f} MB")


def _say(machine: bool, found: dict[str, Any], text: str) -> None:
    if machine:
        _print(found)
    else:
        output().print(text, soft_wrap=True)


def _print(found: Any) -> None:
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
