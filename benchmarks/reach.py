"""Seconds to the same F1: the paper's recipe written plainly, and ours.

    python -m benchmarks.reach --out benchmarks/results/reach.json

The paper's recipe: LoRA r 8, alpha 32, dropout 0.1, AdamW at a constant rate, Eq. 2 to the letter on whole pairs, the
teacher again in every epoch (ways.plain). Its rate is for 3-8B models and teaches a small one nothing, so it is an
option here; of its 50 epochs (A.2) the first 15 are run unless more are asked for. It does not say the
size of a step (A.2): here as large as ours, --batch-tokens is another. F1 is taken after every so many epochs, with the
clock stopped. Ours: SMALL on as many unrelated sentences, trained anew with more epochs each time
until F1 is what the paper's last epoch leaves; the seconds of a run are its own, whole.
Refuses to know how anything is computed. Source: SELF-PARAM, arXiv 2410.00487, A.2.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.injection import f1, machine, target_sets
from benchmarks.ways import plain
from selfparam.inject import inject
from selfparam.inject.pairs import build_rows, epoch_steps
from selfparam.lm import LM
from selfparam.types import PAPER, SMALL, Recipe

EPOCHS = (2, 3, 4, 6, 8, 12, 16, 20, 30)  # of ours


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def paper_recipe(lr: float, epochs: int, batch_tokens: int) -> Recipe:
    """batch_tokens: student tokens of a step (0: as SMALL cuts an epoch into steps)."""
    size = (batch_tokens, 0) if batch_tokens else (SMALL.batch_tokens, SMALL.most_batch_tokens)
    return PAPER.but(lr=lr, epochs=epochs, batch_tokens=size[0], most_batch_tokens=size[1])


def tokens_a_step(model: str, contexts: int, recipe: Recipe) -> int:
    """Student tokens of a step, on average."""
    lm = LM.load(model)
    rows, _ = build_rows(lm, target_sets(lm, contexts)[0], recipe)
    return round(sum(len(r.student) for r in rows) / len(epoch_steps(rows, recipe, random.Random(0))))


def papers(model: str, contexts: int, recipe: Recipe, every: int) -> list[dict[str, float]]:
    """Points {"epochs", "seconds", "f1"} of the paper's recipe."""
    lm = LM.load(model)
    sets, questions = target_sets(lm, contexts)
    points: list[dict[str, float]] = []
    paused, begin = 0.0, time.perf_counter()

    def look(epoch: int, student: Any) -> None:
        nonlocal paused
        if epoch % every and epoch < recipe.epochs:
            return
        now = time.perf_counter()
        student.eval()
        student.merge_adapter()
        found = mean(f1(lm, student.get_base_model(), questions))
        student.unmerge_adapter()
        student.train()
        points.append({"epochs": epoch, "seconds": now - begin - paused, "f1": found})
        print("paper", points[-1], flush=True)
        paused += time.perf_counter() - now

    plain(lm, sets, recipe, look)
    return points


def ours(model: str, contexts: int, target: float) -> list[dict[str, float]]:
    """Points of ours, a run each, up to the first that reaches the target."""
    lm = LM.load(model)
    sets, questions = target_sets(lm, contexts)
    points: list[dict[str, float]] = []
    for epochs in EPOCHS:
        begin = time.perf_counter()
        done = inject(lm, sets, SMALL.but(epochs=epochs))
        seconds = time.perf_counter() - begin
        points.append({"epochs": epochs, "seconds": seconds, "f1": mean(f1(lm, done.lm.model, questions))})
        print("ours", points[-1], flush=True)
        if points[-1]["f1"] >= target:
            break
    return points


def ratios(theirs: list[dict[str, float]], own: list[dict[str, float]]) -> list[float | None]:
    """How many times longer they take to the F1 of each of their points; None where ours did not reach it."""
    sooner = [next((p["seconds"] for p in own if p["f1"] >= one["f1"]), None) for one in theirs]
    return [one["seconds"] / seconds if seconds else None for one, seconds in zip(theirs, sooner, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--contexts", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=15, help="of the paper's recipe")
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3, help="of the paper's recipe")
    parser.add_argument("--batch-tokens", type=int, default=0, help="of a step of the paper's recipe (0: as ours)")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    o = parser.parse_args(argv)
    recipe = paper_recipe(o.lr, o.epochs, o.batch_tokens)
    steps = {who: tokens_a_step(o.model, o.contexts, r) for who, r in (("paper", recipe), ("ours", SMALL))}
    theirs = papers(o.model, o.contexts, recipe, o.every)
    own = ours(o.model, o.contexts, theirs[-1]["f1"])
    found = {"contexts": o.contexts, "lr": o.lr, "model": o.model, "machine": machine(o.model),
             "tokens_a_step": steps, "paper": theirs, "ours": own, "ratios": ratios(theirs, own)}
    print(json.dumps(found["ratios"]))
    if o.out:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
