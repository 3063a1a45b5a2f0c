"""Seconds and GB of an injection into models of 7-8B shapes; random weights, as speed does not depend on their values.

    python -m benchmarks.gpu --shapes llama-3-8b --out benchmarks/results/gpu.json
    python -m benchmarks.gpu --shapes mistral-7b --out benchmarks/results/gpu.json
    python -m benchmarks.gpu --shapes embedded --out benchmarks/results/gpu.json

On a machine with a GPU, a command for each shape: every one adds to the file. Each is to take less than ten minutes:
50 epochs of 1 and 8 contexts and 5 of 100 are 725 steps of 1,024 tokens, of 0.1 s (an 8B model, 33 TFLOP a step at 300
TFLOP/s) to 0.5 s, beside three loads. What fails is noted, and the next measurement begins. `--shapes tiny --device
cpu` runs anywhere. Texts are random words of the fictional worlds, 300 tokens a context, 15 pairs of about 20 tokens
and as many unrelated sentences, the paper's LoRA.
Utilisation is the FLOPs that the method needs (flops.py) over seconds, as a share of a measured matrix product's.
Refuses to know how anything is computed. Source: the models' published configurations
(https://huggingface.co/meta-llama/Meta-Llama-3-8B, https://huggingface.co/mistralai/Mistral-7B-v0.1: config.json).
"""

from __future__ import annotations

import argparse
import gc
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from benchmarks.flops import ceiling, needed
from benchmarks.growth import random_sets
from selfparam.inject import inject
from selfparam.inject.pairs import build_rows
from selfparam.lm import LM
from selfparam.steps import peak_memory_mb
from selfparam.types import PAPER, Recipe, Sentence, TargetSet

_BIG = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8}
SHAPES: dict[str, Any] = {
    "llama-3-8b": LlamaConfig(vocab_size=128_256, max_position_embeddings=8192, rope_theta=500_000.0, **_BIG),
    "mistral-7b": MistralConfig(vocab_size=32_000, max_position_embeddings=32_768, sliding_window=4096, **_BIG),
    "tiny": LlamaConfig(vocab_size=9000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048),
}
FEW = 5  # epochs of many contexts


def load(shape: str, device: torch.device) -> LM:
    """A model of that shape with random weights (bf16 on a GPU), or the embedded one, with the embedded tokenizer."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if shape == "embedded":
        return LM.load(device=str(device))
    tokenizer = LM.load(device="cpu").tokenizer
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype)
    return LM(model.to(device).eval(), tokenizer, shape).checked()


def sets_of(lm: LM, contexts: int) -> list[TargetSet]:
    """300 tokens and 15 pairs a context, and the next context's pairs as its unrelated sentences."""
    sets = random_sets(lm, contexts + 1, 300, 15)
    return [TargetSet(one.context, one.related, tuple(Sentence(s.prompt, s.completion) for s in other.related))
            for one, other in pairwise(sets)]


def measure(shape: str, contexts: int, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """One injection after a short one that warms up: seconds, peak GB, utilisation of both phases."""
    lm = load(shape, device)
    inject(lm, sets_of(lm, 1), recipe.but(epochs=1), in_place=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    sets = sets_of(lm, contexts)
    rows, prefixes = build_rows(lm, sets, recipe)
    teacher, epoch = needed(lm, rows, prefixes, recipe)
    done = inject(lm, sets, recipe, in_place=True)
    peak, dtype = peak_memory_mb(device) or 0.0, lm.model.dtype
    most = ceiling(device, dtype)
    return {
        "shape": shape, "contexts": contexts, "epochs": recipe.epochs, "rows": len(rows),
        "dtype": str(dtype).removeprefix("torch."), "seconds_teacher": done.seconds_teacher,
        "seconds_training": done.seconds_train, "peak_gb": peak / 1000,
        "seconds_per_context": (done.seconds_teacher + done.seconds_train) / contexts, "ceiling": most,
        "utilisation_teacher": teacher / done.seconds_teacher / most,
        "utilisation_training": recipe.epochs * epoch / done.seconds_train / most,
    }


def tried(shape: str, contexts: int, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What measure says, or {"shape", "contexts", "error"}; the memory is free again in both cases."""
    try:
        return measure(shape, contexts, recipe, device)
    except Exception as error:  # of any kind: the other measurements are worth having
        return {"shape": shape, "contexts": contexts, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "embedded"], default=["llama-3-8b", "mistral-7b"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1, 8, 100])
    parser.add_argument("--epochs", type=int, help=f"default: {PAPER.epochs}, and {FEW} of more than 8 contexts")
    parser.add_argument("--batch-tokens", type=int, default=PAPER.batch_tokens)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON; those that are in the file stay")
    o = parser.parse_args(argv)
    device = torch.device(o.device)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                             "torch": torch.__version__, "gpu": []}
    if o.out and o.out.exists():
        earlier = json.loads(o.out.read_text("utf-8"))
        if (earlier["device"], earlier["torch"]) != (found["device"], found["torch"]):
            parser.error(f"{o.out} is of {earlier['device']}, torch {earlier['torch']}: name another file")
        found = earlier
    for shape in o.shapes:
        for contexts in o.contexts:
            epochs = o.epochs or (PAPER.epochs if contexts <= 8 else FEW)
            one = tried(shape, contexts, PAPER.but(epochs=epochs, batch_tokens=o.batch_tokens), device)
            print(json.dumps(one), flush=True)
            others = [e for e in found["gpu"] if (e["shape"], e["contexts"]) != (shape, contexts)]
            found["gpu"] = [*others, one]
            if o.out:
                o.out.parent.mkdir(parents=True, exist_ok=True)
                o.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
