"""Independent injections, one by one against a stack: seconds, and that the losses are the same.

    python -m benchmarks.stack --contexts 16 --epochs 4 --stack 8

One context and one θ' each, as in the paper's table 1; the same sentences, recipe and steps in both rows. Rounds
alternate, so that a busy machine slows both alike; processor seconds are given beside those of the clock.
Refuses to know files and authors. Source: arXiv 2410.00487, section 4.1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.injection import target_sets
from selfparam.inject import inject
from selfparam.inject.stack import STACK, inject_each
from selfparam.lm import LM
from selfparam.types import SMALL, Recipe, TargetSet

Losses = list[tuple[float, ...]]


def measure(lm: LM, sets: Sequence[TargetSet], recipe: Recipe, stack: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round for both, the last epoch's losses, and the largest difference between any two losses."""
    rows: dict[str, Callable[[], Losses]] = {
        "one by one": lambda: [inject(lm, [one], recipe).trained.losses for one in sets],
        "stack": lambda: [done.trained.losses for done in inject_each(lm, sets, recipe, stack=stack)],
    }
    found: dict[str, Any] = {name: {"seconds": [], "processor_seconds": []} for name in rows}
    losses: dict[str, Losses] = {}
    for _ in range(rounds):
        for name, run in rows.items():
            clock, processor = time.perf_counter(), time.process_time()
            losses[name] = run()
            found[name]["seconds"].append(round(time.perf_counter() - clock, 2))
            found[name]["processor_seconds"].append(round(time.process_time() - processor, 2))
            found[name]["last_losses"] = [round(each[-1], 4) for each in losses[name]]
            print(name, found[name], flush=True)
    pairs = zip(losses["one by one"], losses["stack"], strict=True)
    apart = max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))
    return {
        "rows": found,
        "largest_difference_of_losses": apart,
        "contexts": len(sets),
        "stack": stack,
        "sentences": sum(len(one.related) + len(one.unrelated) for one in sets),
        "recipe": recipe.as_dict(),
        "machine": f"{lm.device.type}, {platform.machine()}, {torch.get_num_threads()} threads",
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--stack", type=int, default=STACK)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    o = parser.parse_args()
    lm = LM.load(o.model)
    sets, _ = target_sets(lm, o.contexts)
    found = measure(lm, sets, SMALL.but(epochs=o.epochs, precision=o.precision), o.stack, o.rounds)
    print(f"largest difference of losses: {found['largest_difference_of_losses']:.2g} nats per token")
    if o.out:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
