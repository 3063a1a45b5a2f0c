"""Injection side by side: every way of ways.py on the same contexts, each in a process of its own.

    python -m benchmarks.injection --contexts 8 --epochs 4 --out benchmarks/results/injection.json

Each way starts from the same weights; rounds alternate, so that a busy machine slows all alike: what is compared is the
ratio. A process of its own gives each way its own peak memory (largest resident set, or the GPU's allocations).
Refuses to know how anything is computed; pairs come from the fictional worlds.
Source: SELF-PARAM, arXiv 2410.00487, A.2.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.flops import ceiling, needed
from benchmarks.ways import WAYS
from selfparam.data import worlds
from selfparam.inject import precision
from selfparam.inject.pairs import build_rows
from selfparam.lm import LM
from selfparam.metrics.qa_f1 import qa_f1
from selfparam.steps import peak_memory_mb
from selfparam.targets.unrelated import add_unrelated
from selfparam.types import SMALL, Context, Question, Recipe, Sentence, TargetSet

PER_CONTEXT = 3  # world subjects in one context: about 300 tokens
SAMPLES = 2000  # of the bootstrap


def target_sets(lm: LM, contexts: int) -> tuple[list[TargetSet], list[list[Question]]]:
    """Contexts of some subjects each with the generator's own pairs, as many unrelated ones; questions of each."""
    items = worlds.held_out(contexts * PER_CONTEXT, seed=7)
    sets, questions = [], []
    for at in range(0, len(items), PER_CONTEXT):
        part = items[at : at + PER_CONTEXT]
        x = Context("\n\n".join(i.context.text for i in part))
        pairs = [Sentence(s.prompt, s.completion, x.id) for i in part for s in i.pairs]
        sets.append(TargetSet(x, tuple(pairs)))
        questions.append([q for i in part for q in i.questions])
    return add_unrelated(lm, sets, ratio=1.0, source="packaged", seed=0), questions


def f1(lm: LM, model: Any, questions: list[list[Question]]) -> list[float]:
    """Mean F1 from memory of each context's questions."""
    flat = [q for part in questions for q in part]
    answers = iter(LM(model, lm.tokenizer, lm.name, lm.revision).answer([q.text for q in flat]))
    return [sum(qa_f1(next(answers), q.answers) for q in part) / len(part) for part in questions]


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(SAMPLES))
    return means[SAMPLES // 40], means[-SAMPLES // 40]


def run_one(way: str, model: str, contexts: int, recipe: Recipe, score: bool) -> dict[str, Any]:
    """One way, here: seconds, loss (nats per token), tokens, MB, FLOPs needed, and F1 of each context."""
    lm = LM.load(model)
    sets, questions = target_sets(lm, contexts)
    rows, prefixes = build_rows(lm, sets, recipe)
    teacher, epoch = needed(lm, rows, prefixes, recipe)
    before = peak_memory_mb(lm.device)
    begin, cpu = time.perf_counter(), time.process_time()
    student, loss = WAYS[way](lm, sets, recipe)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "seconds": round(seconds, 3), "cpu": round(cpu, 3), "loss": round(loss, 5),
        "peak_mb": peak_memory_mb(lm.device), "start_mb": before,
        "tokens": recipe.epochs * sum(len(r.student) for r in rows), "flops": teacher + recipe.epochs * epoch,
        "f1": f1(lm, student, questions) if score else None, "sentences": len(rows),
        "tokens_per_context": sum(len(lm.encode(one.context.text)) for one in sets) / len(sets),
    }


def machine(model: str) -> dict[str, Any]:
    """What it ran on, and the ceiling in FLOP/s in float32 and in the precision of ours."""
    lm = LM.load(model)
    with precision(lm, SMALL):
        low = torch.bfloat16 if torch.is_autocast_enabled(lm.device.type) else lm.model.dtype
    return {
        "device": lm.device.type, "processor": platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "ours": str(low).removeprefix("torch."), "ceiling": ceiling(lm.device, low),
    }


def measure(model: str, contexts: int, epochs: int, rounds: int, names: list[str], out: Path | None) -> dict[str, Any]:
    """Every way in every round, each in its own process; written after each. CalledProcessError where one fails."""
    rows: dict[str, Any] = {}
    found = {"rows": rows, "contexts": contexts, "epochs": epochs, "model": model, "machine": machine(model)}
    for turn in range(rounds):
        for name in names:
            spec = {"way": name, "model": model, "contexts": contexts, "epochs": epochs, "score": turn == 0}
            command = [sys.executable, "-m", "benchmarks.injection", "--one", json.dumps(spec)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            one = json.loads(done.stdout.splitlines()[-1])
            seconds = one.pop("seconds")
            rows.setdefault(name, one | {"seconds": []})["seconds"].append(seconds)
            print(f"{name}: {seconds:.1f} s, loss {one['loss']}", flush=True)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: seconds (median), how many times ours, seconds of all threads in the first round (which a busy machine
    stretches less), tokens/s, share of the ceiling, memory, last loss, F1."""
    base = median(found["rows"]["ours"]["seconds"])
    lines = ["| way | seconds | times ours | CPU s | student tokens/s | utilisation | peak MB | loss | F1 (95 %) |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, row in found["rows"].items():
        s = median(row["seconds"])
        share = row["flops"] / s / found["machine"]["ceiling"]
        low, high = interval(row["f1"])
        lines.append(f"| {name} | {s:.1f} | {s / base:.2f} | {row['cpu']:.1f} | {row['tokens'] / s:.0f} | "
                     f"{share:.1%} | {row['peak_mb']:.0f} | {row['loss']:.4f} | {sum(row['f1']) / len(row['f1']):.3f} "
                     f"({low:.3f}-{high:.3f}) |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=[*WAYS], help="ways beside 'ours'")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    o = parser.parse_args(argv)
    if o.one:
        spec = json.loads(o.one)
        recipe = SMALL.but(epochs=spec["epochs"], most_batch_tokens=0)  # larger steps would cost "plain" most
        print(json.dumps(run_one(spec["way"], spec["model"], spec["contexts"], recipe, spec["score"])))
        return
    names = ["ours", *(n for n in WAYS if n != "ours" and (o.only is None or n in o.only))]
    found = measure(o.model, o.contexts, o.epochs, o.rounds, names, o.out)
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
