"""The loss: KL(P_θ(·|x) ‖ P_θ'(·)), exact or of top-k and the rest, or next-word cross-entropy; in chunks, with its own
backward.

Never holds (tokens × vocabulary) for more than a chunk; the head gets a gradient only when it is trained.
Refuses to know models and rows. Source: Eq. 2 of arXiv 2410.00487; F.kl_div semantics, nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

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


class Target(Protocol):
    """What N tokens are trained against; on the student's device, or in main memory, or mapped from a file."""

    def at(self, index: torch.Tensor) -> Target:
        """Of the tokens at index [n], on the index's device."""
        ...

    def meet(self, logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each token [n] in nats and its derivative by the logits [n, V], both float32."""
        ...


@dataclass(frozen=True)
class Words:
    """Next words: ids [N]. Loss: −log P_student(id)."""

    ids: torch.Tensor

    def at(self, index: torch.Tensor) -> Words:
        return Words(_at(self.ids, index))

    def meet(self, logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        log_q = F.log_softmax(logits, dim=-1)
        wanted = self.ids[part, None]
        loss = -log_q.gather(1, wanted).squeeze(1)
        grad = log_q.exp_()
        return loss, grad.scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=grad.dtype))


@dataclass(frozen=True)
class Exact:
    """The teacher's last hidden states [N, d] and its head. Loss: the KL over the whole vocabulary."""

    states: torch.Tensor
    head: Head

    def at(self, index: torch.Tensor) -> Exact:
        return Exact(_at(self.states, index), self.head)

    def meet(self, logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        log_q = F.log_softmax(logits, dim=-1)
        log_p = F.log_softmax(self.head.logits(self.states[part]), dim=-1)
        loss = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return loss, log_q.exp_().sub_(log_p.exp_())


@dataclass(frozen=True)
class Compact:
    """The teacher's k likeliest tokens (ids [N, k], log-probabilities log_p [N, k]) and log of the rest's mass [N].

    Loss: the KL with everything else as one bucket, Σ_k p log(p/q) + p_rest log(p_rest/q_rest). Never above the exact
    KL, which is what is lost by not looking into the bucket. Source: ours; the bucket is the log-sum inequality's.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor

    @staticmethod
    def of(logits: torch.Tensor, k: int) -> Compact:
        """Of the teacher's logits [n, V]. k is at most V − 1, where the bucket is one token and the KL exact."""
        ids = logits.topk(min(k, logits.shape[-1] - 1)).indices
        return Compact(ids.int(), *_in_buckets(F.log_softmax(logits, dim=-1), ids))

    def at(self, index: torch.Tensor) -> Compact:
        return Compact(_at(self.ids, index), _at(self.log_p, index), _at(self.log_rest, index))

    def meet(self, logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        ids, log_p, log_rest = self.ids[part].long(), self.log_p[part], self.log_rest[part]
        log_q = F.log_softmax(logits, dim=-1)
        log_k, log_tail = _in_buckets(log_q, ids)
        p, rest = log_p.exp(), log_rest.exp()
        loss = (p * (log_p - log_k)).sum(-1) + rest * (log_rest - log_tail)
        # q − p inside the top k; in the bucket q − p_rest · (q / q_rest); the bucket's own ids are -inf here
        grad = log_q.exp_() * (1 - (log_rest - log_tail).exp())[:, None]
        return loss, grad.scatter_(1, ids, log_k.exp() - p)


def _at(kept: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return kept[index.to(kept.device)].to(index.device)


def _in_buckets(log_q: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `ids` [n, k] and of all others together [n]. Sets those of `ids` to -inf in log_q [n, V]."""
    chosen = log_q.gather(1, ids)
    return chosen, log_q.scatter_(1, ids, -torch.inf).logsumexp(-1)


class _Chunked(torch.autograd.Function):
    """Σ_n w_n · loss_n over tokens n, gradients made in the forward pass chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        target: Target,
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
            losses[part], grad = target.meet(logits, part)
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
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_h, grad_w, grad_b = ctx.saved_tensors
        g = grads[0]
        return (
            grad_h * g,
            grad_w * g if grad_w is not None else None,
            grad_b * g if grad_b is not None else None,
            None,
            None,
            None,
        )


def loss_of(h: torch.Tensor, head: Head, target: Target, weight: torch.Tensor) -> torch.Tensor:
    """Σ_n w_n · loss_n in nats; the student's h [N, d], weight [N]. A KL is exactly 0 when both sides agree."""
    return _Chunked.apply(h, head.weight, head.bias, head.softcap, target, weight)  # type: ignore[no-any-return, no-untyped-call]


def kl(h: torch.Tensor, head: Head, teacher_h: torch.Tensor, teacher: Head, weight: torch.Tensor) -> torch.Tensor:
    """Σ_n w_n KL(P_teacher,n ‖ P_student,n) in nats; h and teacher_h [N, d], weight [N]."""
    return loss_of(h, head, Exact(teacher_h, teacher), weight)


def next_word(h: torch.Tensor, head: Head, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Σ_n w_n · −log P_student,n(target_n) in nats; h [N, d], targets [N] ids, weight [N]."""
    return loss_of(h, head, Words(targets), weight)


@torch.no_grad()
def loss_of_tokens(h: torch.Tensor, head: Head, target: Target) -> torch.Tensor:
    """The loss of each token in nats [N], without gradient (for measuring)."""
    parts = [slice(at, at + CHUNK) for at in range(0, len(h), CHUNK)]
    found = [target.meet(head.logits(h[part]), part)[0] for part in parts]
    return torch.cat(found) if found else torch.empty(0, device=h.device)


def kl_tokens(h: torch.Tensor, head: Head, teacher_h: torch.Tensor, teacher: Head) -> torch.Tensor:
    """KL of each token in nats [N], without gradient."""
    return loss_of_tokens(h, head, Exact(teacher_h, teacher))
