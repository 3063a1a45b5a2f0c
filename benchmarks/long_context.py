"""What a growing input costs InfLLM and MemoryLLM: bytes and CPU time a token from 1k to 64k tokens.

    python benchmarks/long_context.py --out docs/long_context.json --figure docs/long_context.png

A tiny random Llama reads one stream of random tokens; the shape of the curves is what is measured, not a speed. "near":
bytes where the model is (initial tokens, window, cached blocks), with the representatives, which grow by one vector a
head and block, counted apart. "host": the blocks. "full": the plain model with all keys and values, as far as --full.
Time: CPU seconds of the process a token, of the fastest chunk since the point before (a busy machine slows the others).
Source: arXiv 2402.04617 (InfLLM), arXiv 2402.04624 (MemoryLLM).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from selfparam.lm import LM
from selfparam.methods.blocks import Blocks, Settings, block_attention
from selfparam.methods.infllm import extend
from selfparam.methods.pool import inject_memory, untrained

CHUNK = 512
SETTINGS = Settings(block=32, n_init=32, n_local=256, topk=8, repr_topk=4, exc_block=128, max_cached_block=16,
                    chunk=CHUNK)
MODEL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1}
BLOCKS, TOKENS = 8, 32  # MemoryLLM's pool: 256 tokens a layer


class Ids:
    """All that a model without texts needs of a tokenizer."""

    bos_token_id, eos_token_id, chat_template = 1, 2, None


def measured(most: int, read: Callable[[list[int]], None],
             bytes_now: Callable[[], dict[str, int]]) -> list[dict[str, Any]]:
    """Read `most` random tokens in chunks; a point at 1,024 tokens and at each doubling."""
    generator = torch.Generator().manual_seed(0)
    points: list[dict[str, Any]] = []
    seconds: list[float] = []
    for seen in range(CHUNK, most + 1, CHUNK):
        ids = torch.randint(5, 512, (CHUNK,), generator=generator).tolist()
        begin = time.process_time()
        read(ids)
        seconds.append((time.process_time() - begin) / CHUNK)
        if seen >= 1024 and seen & (seen - 1) == 0:
            points.append({"tokens": seen, "microseconds": round(1e6 * min(seconds), 1), **bytes_now()})
            print(points[-1], flush=True)
            seconds.clear()
    return points


def infllm(lm: LM, most: int) -> list[dict[str, Any]]:
    blocks = Blocks(lm.model, SETTINGS)

    def bytes_now() -> dict[str, int]:
        near, host = blocks.nbytes()
        of_blocks = sum(layer.representatives.nbytes for layer in blocks.layers)
        return {"near": near - of_blocks, "representatives": of_blocks, "host": host}

    with torch.no_grad(), block_attention(lm.model):
        return measured(most, lambda ids: void(extend(lm, blocks, ids, CHUNK)), bytes_now)


def memoryllm(lm: LM, most: int) -> list[dict[str, Any]]:
    model, generator = untrained(lm, BLOCKS, TOKENS), torch.Generator().manual_seed(0)
    memory: list[torch.Tensor | None] = [None]

    def read(ids: list[int]) -> None:
        memory[0] = inject_memory(model, memory[0], ids, generator)

    return measured(most, read, lambda: {"near": memory[0].nbytes if memory[0] is not None else 0})


def full(lm: LM, most: int) -> list[dict[str, Any]]:
    cache = DynamicCache()

    def read(ids: list[int]) -> None:
        lm.hidden(lm.model, input_ids=torch.tensor([ids]), past_key_values=cache)

    with torch.no_grad():
        return measured(most, read, lambda: {"near": sum(one.keys.nbytes + one.values.nbytes for one in cache.layers)})


def void(_: Any) -> None:
    """Drops a result."""


def draw(found: dict[str, Any], path: Path) -> None:
    """Bytes where the model is, and time a token, against the length of the input."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in found["methods"].items():
        x = [p["tokens"] for p in points]
        left.plot(x, [p["near"] / 1e6 for p in points], marker="o", label=name)
        right.plot(x, [p["microseconds"] for p in points], marker="o", label=name)
    points = found["methods"]["InfLLM"]
    x = [p["tokens"] for p in points]
    left.plot(x, [p["representatives"] / 1e6 for p in points], "--", color="C0", label="InfLLM, representatives")
    left.plot(x, [p["host"] / 1e6 for p in points], ":", color="C0", label="InfLLM, blocks in host memory")
    left.set(ylabel="MB", yscale="log", title="memory")
    right.set(ylabel="µs a token (CPU)", yscale="log", title="time")
    for axes in (left, right):
        axes.set(xlabel="tokens read", xscale="log")
        axes.set_xticks([1024 << i for i in range(7)], [f"{1 << i}k" for i in range(7)])
        axes.minorticks_off()
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--full", type=int, default=16_384, help="how far the plain model reads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    lm = LM(LlamaForCausalLM(LlamaConfig(**MODEL)).eval(), Ids(), "tiny-random")
    methods = {"InfLLM": infllm(lm, options.tokens), "MemoryLLM": memoryllm(lm, options.tokens),
               "full attention": full(lm, options.full)}
    found = {"model": MODEL, "infllm": SETTINGS.__dict__, "memoryllm": {"blocks": BLOCKS, "tokens": TOKENS},
             "torch": torch.__version__, "machine": platform.machine(), "methods": methods}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
