"""Injection side by side in one process: the paper's recipe written plainly, ours, and ours less one ingredient each.

    python benchmarks/injection.py --contexts 8 --epochs 4

Same model, contexts, sentences, order, batch size and epochs in every row; each row starts from the same weights, and
rounds alternate so that a busy machine slows all rows alike. What is compared is the ratio. "plain": two copies of the
model, the teacher reads x in front of every sentence again in every epoch, batches are padded, all logits are dense.
Refuses to know files and authors (pairs come from the fictional worlds).
Source: SELF-PARAM, arXiv 2410.00487, A.2 (the recipe); DESIGN, "What the core rests on" (the ingredients).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from selfparam.data import worlds
from selfparam.inject import inject, loop
from selfparam.inject.pairs import Row, build_rows, epoch_steps, pack
from selfparam.inject.teacher import teacher_states
from selfparam.inject.trainable import make_optimizers, make_trainable
from selfparam.lm import LM
from selfparam.metrics.qa_f1 import qa_f1
from selfparam.targets.unrelated import add_unrelated
from selfparam.types import SMALL, Context, Question, Recipe, Sentence, TargetSet

PER_CONTEXT = 2  # world subjects in one context: about 300 tokens


def target_sets(lm: LM, contexts: int) -> tuple[list[TargetSet], list[Question]]:
    """Contexts of two subjects each with the generator's own pairs, as many unrelated ones, and questions."""
    items = worlds.held_out(contexts * PER_CONTEXT, seed=7)
    sets, questions = [], []
    for at in range(0, len(items), PER_CONTEXT):
        part = items[at : at + PER_CONTEXT]
        x = Context("\n\n".join(i.context.text for i in part))
        pairs = [Sentence(s.prompt, s.completion, x.id) for i in part for s in i.pairs]
        sets.append(TargetSet(x, tuple(pairs)))
        questions += [q for i in part for q in i.questions]
    return add_unrelated(lm, sets, ratio=1.0, seed=0), questions


def plain(lm: LM, sets: Sequence[TargetSet], recipe: Recipe) -> tuple[Any, float]:
    """The paper's recipe as one would first write it. Returns θ' and the last epoch's loss in nats per token."""
    rows, prefixes = build_rows(lm, sets, recipe)
    teacher, student = lm.model, LM(copy.deepcopy(lm.model), lm.tokenizer, lm.name, lm.revision)
    torch.manual_seed(recipe.seed)
    model = make_trainable(student, recipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    [optimizer] = make_optimizers(parameters, recipe)
    rng = random.Random(recipe.seed)
    steps = len(epoch_steps(rows, recipe.batch_tokens, random.Random(0))) * recipe.epochs
    step, mean = 0, 0.0
    model.train()
    for _ in range(recipe.epochs):
        total = count = 0.0
        for chosen in epoch_steps(rows, recipe.batch_tokens, rng):
            part = [rows[i] for i in chosen]
            with torch.no_grad():
                log_p = _padded(teacher, [[*prefixes[r.prefix], *r.s] for r in part], lm)
            log_q = _padded(model, [list(r.student) for r in part], lm)
            losses = []
            for i, r in enumerate(part):
                n, t, s = r.scored, len(prefixes[r.prefix]) + len(r.s), len(r.student)
                pair = (log_q[i, s - n - 1 : s - 1], log_p[i, t - n - 1 : t - 1])
                losses.append(F.kl_div(*pair, reduction="none", log_target=True).sum(-1))
            loss = torch.cat(losses).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * loop.factor(step, steps, recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            total += float(loss.detach()) * sum(r.scored for r in part)
            count += sum(r.scored for r in part)
        mean = total / count
    return model.merge_and_unload().eval(), mean


def _padded(model: Any, rows: Sequence[list[int]], lm: LM) -> torch.Tensor:
    """log-probabilities [B, T, V] of rows padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([r + lm.bos * (width - len(r)) for r in rows], device=lm.device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=lm.device)
    return F.log_softmax(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float(), dim=-1)


def ours(lm: LM, sets: Sequence[TargetSet], recipe: Recipe) -> tuple[Any, float]:
    done = inject(lm, sets, recipe)
    return done.lm.model, done.trained.losses[-1]


def teacher_every_epoch(lm: LM, sets: Sequence[TargetSet], recipe: Recipe) -> tuple[Any, float]:
    """Ours, but the teacher pass runs again for every further epoch."""
    rows, prefixes = build_rows(lm, sets, recipe)

    def again(epoch: int, epochs: int, loss: float) -> None:
        if epoch < epochs:
            teacher_states(lm, rows, prefixes)

    done = inject(lm, sets, recipe, progress=again)
    return done.lm.model, done.trained.losses[-1]


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The owner's function, replaced for as long as the region lasts."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def one_prefix_each(lm: LM, sets: Sequence[TargetSet], recipe: Recipe) -> tuple[Any, float]:
    """Ours, but every sentence brings x with it: nothing is shared between the sentences of a context."""

    def alone(lm: LM, sets: Sequence[TargetSet], recipe: Recipe) -> tuple[list[Row], list[list[int]]]:
        rows, prefixes = build_rows(lm, sets, recipe)
        each = [Row(r.student, r.first, i, r.s, r.weight, r.related) for i, r in enumerate(rows)]
        return each, [prefixes[r.prefix] for r in rows]

    with instead(import_module("selfparam.inject"), "build_rows", alone):
        return ours(lm, sets, recipe)


def padded_rows(lm: LM, sets: Sequence[TargetSet], recipe: Recipe) -> tuple[Any, float]:
    """Ours, but one sentence a line, padded to the longest."""

    def lines(rows: Sequence[Row], chosen: Sequence[int], starts: Sequence[int], width: int, pad: int) -> Any:
        parts = [pack(rows, [i], starts, 1, pad) for i in chosen]
        width = max(p.ids.shape[1] for p in parts)

        def wide(t: torch.Tensor, value: int) -> torch.Tensor:
            return F.pad(t, (0, width - t.shape[1]), value=value)

        ids, positions = [wide(p.ids, pad) for p in parts], [wide(p.position_ids, 0) for p in parts]
        index = torch.cat([p.index + i * width for i, p in enumerate(parts)])
        rest = (torch.cat([p.source for p in parts]), torch.cat([p.weight for p in parts]))
        return type(parts[0])(torch.cat(ids), torch.cat(positions), index, *rest)

    with instead(loop, "pack", lines):
        return ours(lm, sets, recipe)


def dense_kl(lm: LM, sets: Sequence[TargetSet], recipe: Recipe) -> tuple[Any, float]:
    """Ours, but all logits of a step at once and autograd's backward."""

    def dense(h: torch.Tensor, head: Any, teacher_h: torch.Tensor, teacher: Any, w: torch.Tensor) -> torch.Tensor:
        log_q, log_p = F.log_softmax(head.logits(h), -1), F.log_softmax(teacher.logits(teacher_h), -1)
        return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * w).sum()

    with instead(loop, "kl", dense):
        return ours(lm, sets, recipe)


def in_float32(lm: LM, sets: Sequence[TargetSet], recipe: Recipe) -> tuple[Any, float]:
    return ours(lm, sets, recipe.but(precision="fp32"))


ROWS: dict[str, Callable[[LM, Sequence[TargetSet], Recipe], tuple[Any, float]]] = {
    "ours": ours,
    "plain": plain,
    "ours, teacher again every epoch": teacher_every_epoch,
    "ours, no shared prefix": one_prefix_each,
    "ours, padded rows": padded_rows,
    "ours, dense KL": dense_kl,
    "ours, float32": in_float32,
}


def f1(lm: LM, model: Any, questions: Sequence[Question]) -> float:
    answers = LM(model, lm.tokenizer, lm.name, lm.revision).answer([q.text for q in questions])
    return sum(qa_f1(a, q.answers) for a, q in zip(answers, questions, strict=True)) / len(questions)


def measure(lm: LM, contexts: int, epochs: int, rounds: int, names: Sequence[str]) -> dict[str, Any]:
    """Seconds of every round, last loss (nats per token) and F1 from memory, for every row."""
    sets, questions = target_sets(lm, contexts)
    recipe = SMALL.but(epochs=epochs)
    found: dict[str, Any] = {name: {"seconds": []} for name in names}
    for turn in range(rounds):
        for name in names:
            begin = time.perf_counter()
            model, loss = ROWS[name](lm, sets, recipe)
            found[name]["seconds"].append(round(time.perf_counter() - begin, 3))
            if turn == 0:
                found[name] |= {"loss": round(loss, 5), "f1": round(f1(lm, model, questions), 3)}
            print(name, found[name], flush=True)
    tokens = [len(lm.encode(one.context.text)) for one in sets]
    return {
        "rows": found,
        "contexts": contexts,
        "tokens_per_context": sum(tokens) / len(tokens),
        "sentences": sum(len(one.related) + len(one.unrelated) for one in sets),
        "epochs": epochs,
        "machine": f"{lm.device.type}, {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: seconds (median), how many times ours that is, loss and F1."""
    base = median(found["rows"]["ours"]["seconds"])
    lines = ["| row | seconds | times ours | last loss | F1 |", "| --- | --- | --- | --- | --- |"]
    for name, row in found["rows"].items():
        s = median(row["seconds"])
        lines.append(f"| {name} | {s:.1f} | {s / base:.2f} | {row['loss']:.4f} | {row['f1']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=[*ROWS], help="rows beside 'ours'")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    o = parser.parse_args()
    names = ["ours", *(n for n in ROWS if n != "ours" and (o.only is None or n in o.only))]
    found = measure(LM.load(o.model), o.contexts, o.epochs, o.rounds, names)
    print(
        f"\n{found['contexts']} contexts of {found['tokens_per_context']:.0f} tokens, {found['sentences']} sentences, "
        f"{found['epochs']} epochs; {found['machine']}\n\n{table(found)}"
    )
    if o.out:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
