"""How seconds grow: over the number of contexts, over their length, over the pairs for each.

    python -m benchmarks.growth --out benchmarks/results/growth.json

Contexts and pairs grow on the embedded model, length on a small random one with a window that is long enough; texts are
words drawn from the fictional worlds, since only their number matters. Each point is timed twice and the faster one
kept. The exponent is the slope of a straight line through log(seconds) over log(size), fixed costs included.
Refuses to know how anything is computed. Source: issue of this benchmark: linear where the exponent is at most 1.05.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from selfparam.data import worlds
from selfparam.inject import inject
from selfparam.lm import LM
from selfparam.types import SMALL, Context, Sentence, TargetSet

SIZES = {
    "contexts": (10, 20, 50, 100, 200, 500),
    "length": (100, 200, 500, 1000, 2000, 4000),
    "pairs": (4, 8, 16, 32, 64),
}
ROUNDS = 2


def words(lm: LM, tokens: int, pool: Sequence[str], rng: random.Random) -> str:
    """About so many tokens of words in random order."""
    found: list[str] = []
    while len(found) < tokens:
        found.append(rng.choice(pool))
    return lm.decode(lm.encode(" ".join(found))[:tokens])


def random_sets(lm: LM, contexts: int, length: int, pairs: int) -> list[TargetSet]:
    """Contexts of `length` tokens with `pairs` questions of 12 and answers of 6 tokens each; nothing unrelated."""
    rng = random.Random(0)
    pool = sorted({w for item in worlds.held_out(20, seed=3) for w in item.context.text.split()})
    found = []
    for _ in range(contexts):
        x = Context(words(lm, length, pool, rng))
        related = (Sentence(words(lm, 12, pool, rng), words(lm, 6, pool, rng), x.id) for _ in range(pairs))
        found.append(TargetSet(x, tuple(related)))
    return found


def wide_model(window: int, device: torch.device) -> LM:
    """A random Llama of 13 million parameters with a long window and the embedded model's tokenizer."""
    tokenizer = LM.load().tokenizer
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
                         num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=window,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return LM(model.to(device).eval(), tokenizer, "random").checked()


def timed(lm: LM, sets: Sequence[TargetSet], epochs: int) -> dict[str, float]:
    """Seconds of the teacher pass and of the training, the faster of ROUNDS each."""
    done = [inject(lm, sets, SMALL.but(epochs=epochs, most_batch_tokens=0)) for _ in range(ROUNDS)]
    return {"teacher": min(d.seconds_teacher for d in done), "training": min(d.seconds_train for d in done),
            "rows": done[0].rows}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) over log(size), least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def measure(sizes: dict[str, Sequence[int]], epochs: int) -> dict[str, Any]:
    """Points and exponents of every kind of growth."""
    embedded, found = LM.load(), {}
    wide = wide_model(max(sizes["length"]) + 256, embedded.device)
    for what, steps in sizes.items():
        points = []
        for n in steps:
            lm = wide if what == "length" else embedded
            shape = {"contexts": 16, "length": 150, "pairs": 8} | {what: n}
            points.append({"size": n, **timed(lm, random_sets(lm, **shape), epochs)})
            print(what, points[-1], flush=True)
        found[what] = {"points": points, "exponent": {
            phase: exponent(steps, [p[phase] for p in points]) for phase in ("teacher", "training")}}
    return {"growth": found, "epochs": epochs, "device": embedded.device.type}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--largest", type=float, default=1.0, help="leave out sizes above this share of the largest")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    o = parser.parse_args(argv)
    sizes = {what: [n for n in each if n <= max(each[1], o.largest * each[-1])] for what, each in SIZES.items()}
    found = measure(sizes, o.epochs)
    if o.out:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
