"""What `compact` teacher targets lose against `exact` ones, and what both take: on the embedded model.

    python -m benchmarks.caches [--contexts 8] [--epochs 4]

The student is the model before the injection, where the teacher differs most, and after one with the exact KL. Errors
are of the same tokens: exact KL minus compact KL, in nats per token; it is never negative. The last column trains with
that target and measures the exact KL that is left. Refuses to know how they are computed. Source: ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.injection import target_sets
from selfparam.inject import inject, precision
from selfparam.inject.memory import Kept
from selfparam.inject.objective import Target, loss_of_tokens
from selfparam.inject.pairs import Row, build_rows, offsets, pack
from selfparam.inject.teacher import as_target, head_of, teacher_targets
from selfparam.lm import LM
from selfparam.types import SMALL

TOP = (8, 64, 256)


@torch.no_grad()
def losses(student: LM, rows: Sequence[Row], targets: Target) -> torch.Tensor:
    """Loss of every scored token in nats."""
    found = []
    for at in range(0, len(rows), 64):
        part = range(at, min(len(rows), at + 64))
        packed = pack(rows, part, offsets(rows), 256, student.bos[0]).to(student.device)
        h = student.hidden(student.model, input_ids=packed.ids, position_ids=packed.position_ids)
        each = loss_of_tokens(h.flatten(0, 1)[packed.index], head_of(student), targets.at(packed.source))
        found.append(each[packed.weight > 0])
    return torch.cat(found)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    o = parser.parse_args(argv)
    lm, recipe = LM.load(), SMALL.but(epochs=o.epochs)
    sets, _ = target_sets(lm, o.contexts)
    rows, prefixes = build_rows(lm, sets, recipe)
    after = {k: inject(lm, sets, recipe.but(top_k=k)).lm for k in (0, *TOP)}
    with precision(lm, recipe):
        kept = {k: _targets(lm, rows, prefixes, k) for k in after}
        exact = {when: losses(student, rows, kept[0][0]) for when, student in (("before", lm), ("after", after[0]))}
        print("| k | bytes a token | KL before | lost: mean, largest | KL after | lost | exact KL when trained on it |",
              "| --- | --- | --- | --- | --- | --- | --- |", sep="\n")
        for k, (target, size) in kept.items():
            now, then = losses(lm, rows, target), losses(after[0], rows, target)
            gone = exact["before"] - now
            left = losses(after[k], rows, kept[0][0]).mean()
            print(f"| {k or 'exact'} | {size} | {now.mean():.4f} | {gone.mean():.2e}, {gone.max():.2e} | "
                  f"{then.mean():.4f} | {(exact['after'] - then).mean():.2e} | {left:.4f} |", flush=True)


def _targets(lm: LM, rows: Sequence[Row], prefixes: Sequence[Sequence[int]], k: int) -> tuple[Target, int]:
    """The teacher's targets and their bytes a token."""
    with Kept(lm.device) as kept:
        tensors = teacher_targets(lm, rows, prefixes, kept, k)
    return as_target(tensors, head_of(lm)), sum(t[:1].nbytes for t in tensors.values())


if __name__ == "__main__":
    main()
