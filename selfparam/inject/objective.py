"""The loss: KL(P_θ(·|x) ‖ P_θ'(·)) or next-word cross-entropy, in chunks, with its own backward.

Never holds (tokens × vocabulary) for more than a chunk; the head gets a gradient only when it is trained.
Refuses to know models and rows. Source: Eq. 2 of arXiv 2410.00487; F.kl_div semantics, nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

CHUNK = 1024  # tokens whose logits exist at the same time


@dataclass(frozen=True)
class Head:
    """From last hidden states h [N, d] to logits [N, V]: h·Wᵀ + b, then c·tanh(·/c) where there is a soft-cap."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """float32 logits [N, V] of h [N, d]."""
        raw = F.linear(h.to(self.weight.dtype), self.weight, self.bias).float()
        return torch.tanh(raw / self.softcap) * self.softcap if self.softcap else raw

    def frozen(self, copy: bool) -> Head:
        """The same head without gradient; a copy when the original will be trained.

        Inside autocast, in its type: the same numbers, without a cast in every step.
        """
        device, kind = self.weight.device.type, self.weight.dtype
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
        w = self.weight.detach().to(kind, copy=copy)
        return Head(w, self.bias.detach().to(kind, copy=copy) if self.bias is not None else None, self.softcap)


class _Chunked(torch.autograd.Function):
    """Σ_n w_n · loss_n over tokens n, gradients made in the forward pass chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        teacher: Head | None,
        targets: torch.Tensor,
        w: torch.Tensor,
    ) -> torch.Tensor:
        head = Head(weight, bias, softcap)
        grad_h = torch.zeros_like(h)
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        grad_b = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and bias.requires_grad else None
        losses = torch.empty(len(h), device=h.device)
        for at in range(0, len(h), CHUNK):
            part = slice(at, at + CHUNK)
            logits = head.logits(h[part])
            log_q = F.log_softmax(logits, dim=-1)
            grad = log_q.exp()
            if teacher is None:
                losses[part] = -log_q.gather(1, targets[part, None]).squeeze(1)
                grad.scatter_add_(1, targets[part, None], -torch.ones_like(targets[part, None], dtype=grad.dtype))
            else:
                log_p = F.log_softmax(teacher.logits(targets[part]), dim=-1)
                losses[part] = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
                grad -= log_p.exp()
            grad *= w[part, None]
            if softcap:
                grad *= 1 - (logits / softcap) ** 2
            low = grad.to(weight.dtype)
            grad_h[part] = (low @ weight).to(h.dtype)
            if grad_w is not None:
                grad_w += (low.T @ h[part].to(weight.dtype)).float()
            if grad_b is not None:
                grad_b += grad.sum(0)
        ctx.save_for_backward(grad_h, grad_w, grad_b)
        return (losses * w).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad_h, grad_w, grad_b = ctx.saved_tensors
        g = grads[0]
        return (
            grad_h * g,
            grad_w * g if grad_w is not None else None,
            grad_b * g if grad_b is not None else None,
            None,
            None,
            None,
            None,
        )


def kl(h: torch.Tensor, head: Head, teacher_h: torch.Tensor, teacher: Head, weight: torch.Tensor) -> torch.Tensor:
    """Σ_n w_n KL(P_teacher,n ‖ P_student,n) in nats; h and teacher_h [N, d], weight [N]. Exactly 0 when both agree."""
    return _Chunked.apply(h, head.weight, head.bias, head.softcap, teacher, teacher_h, weight)  # type: ignore[no-any-return, no-untyped-call]


def next_word(h: torch.Tensor, head: Head, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Σ_n w_n · −log P_student,n(target_n) in nats; h [N, d], targets [N] ids, weight [N]."""
    return _Chunked.apply(h, head.weight, head.bias, head.softcap, None, targets, weight)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def kl_tokens(h: torch.Tensor, head: Head, teacher_h: torch.Tensor, teacher: Head) -> torch.Tensor:
    """KL of each token in nats [N], without gradient (for measuring)."""
    found = []
    for at in range(0, len(h), CHUNK):
        log_q = F.log_softmax(head.logits(h[at : at + CHUNK]), dim=-1)
        log_p = F.log_softmax(teacher.logits(teacher_h[at : at + CHUNK]), dim=-1)
        found.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
    return torch.cat(found) if found else torch.empty(0)
