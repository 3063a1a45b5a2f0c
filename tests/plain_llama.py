"""Llama written plainly in float64, and InfLLM and MemoryLLM on it, token by token: references for the tests.

Own loops over tokens and heads, full matrices, absolute positions; nothing of selfparam/methods is used.
Source: arXiv 2302.13971 (Llama), 2402.04617 (InfLLM), 2402.04624 (MemoryLLM).
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
Factors = dict[str, Tensor]


class Plain:
    """The weights of a transformers Llama in float64. extra: what an adapter adds, by name of the matrix."""

    def __init__(self, model: Any, extra: Factors | None = None) -> None:
        self.config = model.config
        self.w = {k.replace(".base_layer", ""): v.double() for k, v in model.state_dict().items() if "lora_" not in k}
        for name, delta in (extra or {}).items():
            self.w[f"{name}.weight"] = self.w[f"{name}.weight"] + delta.double()
        self.layers = self.config.num_hidden_layers
        self.dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.w[f"{name}.weight"]

    def heads(self, x: Tensor, layer: int, which: str) -> Tensor:
        """[T, heads, dh] of the projection q, k or v of x [T, d], behind the layer norm."""
        at = f"model.layers.{layer}."
        y = self.norm(x, f"{at}input_layernorm") @ self.w[f"{at}self_attn.{which}_proj.weight"].T
        return y.view(len(x), -1, self.dim)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoPE of x [T, heads, dh] at positions [T], as products of complex numbers."""
        rope, half = self.config.rope_parameters, self.dim // 2
        speeds = rope["rope_theta"] ** (-torch.arange(half).double() / half) / rope.get("factor", 1.0)
        angles = positions[:, None] * speeds
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1)

    def rest(self, x: Tensor, attended: Tensor, layer: int) -> Tensor:
        """Outputs of a layer from its inputs [T, d] and attention's outputs [T, H · dh]."""
        at = f"model.layers.{layer}."
        x = x + attended @ self.w[f"{at}self_attn.o_proj.weight"].T
        y = self.norm(x, f"{at}post_attention_layernorm")
        gate = torch.nn.functional.silu(y @ self.w[f"{at}mlp.gate_proj.weight"].T)
        return x + (gate * (y @ self.w[f"{at}mlp.up_proj.weight"].T)) @ self.w[f"{at}mlp.down_proj.weight"].T

    def head(self, x: Tensor) -> Tensor:
        return self.norm(x, "model.norm") @ self.w["lm_head.weight"].T

    def embed(self, ids: list[int]) -> Tensor:
        return self.w["model.embed_tokens.weight"][ids]


def infllm(plain: Plain, ids: list[int], s: Any) -> tuple[Tensor, list[list[int]]]:
    """Logits [T, V], and the first tokens of the last layer's blocks that each execution block looked at."""
    x, looked = plain.embed(ids), []
    for layer in range(plain.layers):
        q, k, v = (plain.heads(x, layer, which) for which in "qkv")
        H, group = q.shape[1], q.shape[1] // k.shape[1]
        out = torch.zeros(len(ids), H, plain.dim, dtype=torch.float64)
        score = torch.zeros(H, len(ids), dtype=torch.float64)
        ninit = start = 0
        blocks: list[tuple[int, Tensor]] = []
        looked = []
        at = torch.arange(len(ids))
        q_near, k_near = plain.rotate(q, at), plain.rotate(k, at)
        q_far = plain.rotate(q, torch.full_like(at, s.n_local - 1))
        chunks = range(0, len(ids) - 1, s.chunk)
        borders = [i for c in chunks for i in range(c, min(c + s.chunk, len(ids) - 1), s.exc_block)] + [len(ids) - 1]
        for first, end in zip(borders, [*borders[1:], len(ids)], strict=True):
            mean = q_far[first:end].mean(0)
            ranked = sorted(blocks, key=lambda one: -float((mean * one[1]).sum()))
            chosen = ranked[: s.topk]
            looked.append(sorted(begin for begin, _ in chosen))
            distant = [*range(ninit), *(begin + i for begin, _ in chosen for i in range(s.block)),
                       *range(start, max(start, end - s.n_local))]
            for t in range(first, end):
                near = range(max(0, t - s.n_local + 1), t + 1)
                for h in range(H):
                    logits = torch.cat([k_near[list(near), h // group] @ q_near[t, h],
                                        k[distant, h // group] @ q_far[t, h]])
                    p = (logits / plain.dim ** 0.5).softmax(0)
                    out[t, h] = p @ v[[*near, *distant], h // group]
                    score[h, list(near)] += p[: len(near)]
            if ninit < s.n_init and end - start > s.n_local:
                moved = min(s.n_init - ninit, end - start - s.n_local)
                ninit, start = ninit + moved, start + moved
            while end - start - s.block >= s.n_local:
                means = []
                for h in range(H):
                    best = score[h, start : start + s.block].topk(s.repr_topk).indices
                    means.append(k[start + best, h // group].mean(0))
                blocks.append((start, torch.stack(means)))
                start += s.block
        x = plain.rest(x, out.flatten(1), layer)
    return plain.head(x), looked


def attend(plain: Plain, x: Tensor, layer: int, prefix: int) -> Tensor:
    """Outputs of a layer for x[prefix:]; each row sees the rows up to itself, RoPE counts from the first row of x."""
    q, k, v = (plain.heads(x, layer, which) for which in "qkv")
    group, at = q.shape[1] // k.shape[1], torch.arange(len(x))
    q, k = plain.rotate(q, at), plain.rotate(k, at)
    out = []
    for t in range(prefix, len(x)):
        each = []
        for h in range(q.shape[1]):
            p = (k[: t + 1, h // group] @ q[t, h] / plain.dim ** 0.5).softmax(0)
            each.append(p @ v[: t + 1, h // group])
        out.append(torch.cat(each))
    return plain.rest(x[prefix:], torch.stack(out), layer)


def memory_write(plain: Plain, start: Tensor, position: Tensor, memory: Tensor | None, K: int,
                 ids: list[int]) -> Tensor:
    """What ids leave in each layer [L, K, d]."""
    h, found = plain.embed(ids), []
    for layer in range(plain.layers):
        x = h if memory is None else torch.cat([start[layer], memory[layer, -K:], h]).double()
        x = x.clone()
        x[-K:] += position[0].double()
        out = attend(plain, x, layer, 0 if memory is None else min(1 + K, len(x) - K))
        found.append(out[-K:])
        h = out[-len(ids) :]
    return torch.stack(found)


def memory_read(plain: Plain, start: Tensor, memory: Tensor, ids: list[int]) -> Tensor:
    """Logits [n, V] of ids behind a memory [L, N, d]."""
    h = plain.embed(ids)
    for layer in range(plain.layers):
        x = torch.cat([start[layer], memory[layer], h]).double()
        h = attend(plain, x, layer, len(x) - len(ids))
    return plain.head(h)
