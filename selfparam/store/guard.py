"""The guard: what an update must show before it becomes the head of a store. Numbers in, reasons out.

Refuses to know models and files: whoever measured hands in a Measured. Source: ours; results/guard.json has what
benchmarks/guard.py measured of harmful and of normal updates.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The largest values that pass.

    drift       nats per token from the parent on held-out unrelated text. 0.3 is a factor of 1.35 in perplexity. The
                normal updates had 0.01 at most, 0.11 where they rehearsed, those with a hundredfold learning rate
                about 5 and more
    forgetting  mean F1 that the probes (questions about earlier contexts) may lose against the parent: 0.03 at most
                in the normal updates, 0.16 where they rehearsed
    decay       mean F1 that they may lose against the best score that any earlier snapshot recorded for them: many
                small losses in a row, each below `forgetting`. In 30 normal updates in a row it was 0.13 at most, where
                they rehearsed 0.51 (docs/LOG.md)
    surprise    nats per UTF-8 byte of a new context under the parent. Random letters cost every model at least
                ln 26 = 3.26 on average (7.7 to 8.2 with digits and signs), prose far less: 0.2 to 0.5
    """

    drift: float = 0.3
    forgetting: float = 0.25
    decay: float = 0.6
    surprise: float = 2.5

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def of(cls, given: Any) -> Limits:
        """From what as_dict gave and a person may have edited. Raises ValueError that names the wrong one."""
        if not isinstance(given, dict):
            raise ValueError("'limits' is no object")
        known = {one.name for one in fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"there is no limit '{name}' (there are: {', '.join(sorted(known))})")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"the limit '{name}' is no number of at least 0")
        return cls(**{name: float(value) for name, value in given.items()})


@dataclass(frozen=True)
class Measured:
    """What is known about an update. None: not measured (no probes, nothing recorded).

    merge_error, drift in nats per token; surprise in nats per byte, of the strangest context; forgetting and decay in
    mean F1 over `probes` questions.
    """

    weights_finite: bool
    losses_finite: bool
    merge_error: float
    merge_tolerance: float
    drift: float
    surprise: float | None = None
    probes: int = 0
    forgetting: float | None = None
    decay: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are none become null."""
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in asdict(self).items()}


def faults(measured: Measured, limits: Limits) -> list[str]:
    """Why the update must not become the head, a line for each reason; empty where it may. NaN never passes."""
    found = []
    if not measured.weights_finite:
        found.append("weights that are no finite numbers")
    if not measured.losses_finite:
        found.append("a loss that is no finite number")
    if not measured.merge_error <= measured.merge_tolerance:
        found.append(f"merged weights differ from the trained ones by {measured.merge_error:.2g} nats per token "
                     f"(limit {measured.merge_tolerance:g})")
    for name, value, limit, unit in (
        ("drift", measured.drift, limits.drift, "nats per token on unrelated text"),
        ("forgetting", measured.forgetting, limits.forgetting, f"F1 lost on {measured.probes} probes"),
        ("decay", measured.decay, limits.decay, "F1 below the best that earlier snapshots had on the probes"),
        ("surprise", measured.surprise, limits.surprise, "nats per byte: a context reads like random characters"),
    ):
        if value is not None and not value <= limit:
            found.append(f"{name} {value:.3g} {unit} (limit {limit:g})")
    return found
