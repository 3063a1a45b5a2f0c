"""Ways to inject the same target sets: a recipe written plainly, TRL's trainer, ours, ours less one thing.

Same model, sentences, epochs and seed in every way; the same order and steps in all but TRL's. "plain": two copies of
the model, the teacher reads x in front of every sentence again in every epoch, batches are padded, logits are dense.
"TRL": SDFTTrainer, the trainer whose teacher has a context that the student lacks (GKDTrainer cannot express that: its
teacher reads what the student reads). It samples its sentences from the student in every step; here it is given ours,
or nothing could be compared. What stays different: rows padded, the teacher again every step (adapters off, so one copy
of the model), dense logits, the loss averaged over each sentence first.
Refuses to know files, clocks and memory.
Source: SELF-PARAM, arXiv 2410.00487, A.2; TRL's SDFTTrainer, arXiv 2601.19897; DESIGN, "What the core rests on".
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import functional as F

from selfparam.inject import inject, loop, pairs, precision
from selfparam.inject.pairs import Row, build_rows, epoch_steps, pack
from selfparam.inject.teacher import teacher_states
from selfparam.inject.trainable import lora_targets, make_optimizers, make_trainable
from selfparam.lm import LM
from selfparam.types import Recipe, TargetSet

Sets = Sequence[TargetSet]
#: θ' and the last epoch's loss in nats per token
Done = tuple[Any, float]


def plain(lm: LM, sets: Sets, recipe: Recipe, look: Callable[[int, Any], None] | None = None) -> Done:
    """The recipe as one would first write it. look: is given every epoch's number and the peft model."""
    rows, prefixes = build_rows(lm, sets, recipe)
    teacher, student = lm.model, LM(copy.deepcopy(lm.model), lm.tokenizer, lm.name, lm.revision)
    torch.manual_seed(recipe.seed)
    model = make_trainable(student, recipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    [optimizer] = make_optimizers(parameters, recipe)
    rng = random.Random(recipe.seed)
    steps = len(epoch_steps(rows, recipe, random.Random(0))) * recipe.epochs
    step, mean = 0, 0.0
    model.train()
    for epoch in range(1, recipe.epochs + 1):
        total = count = 0.0
        for chosen in epoch_steps(rows, recipe, rng):
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
        if look:
            look(epoch, model)
    return model.merge_and_unload().eval(), mean


def _padded(model: Any, rows: Sequence[list[int]], lm: LM) -> torch.Tensor:
    """log-probabilities [B, T, V] of rows padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([r + lm.bos * (width - len(r)) for r in rows], device=lm.device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=lm.device)
    return F.log_softmax(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float(), dim=-1)


def trl(lm: LM, sets: Sets, recipe: Recipe) -> Done:
    """TRL's SDFTTrainer, given our sentences instead of sampling its own. Rows travel as ids written as JSON."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    class Given(SDFTTrainer):
        def sample_rollouts(self, inputs: list[dict[str, Any]]) -> Any:
            self.given = [one["completion"] for one in inputs]
            return super().sample_rollouts(inputs)

        def _generate(self, prompt_ids: list[list[int]]) -> Any:
            return prompt_ids, self.given

        def _tokenize_prompts(self, prompts: list[str]) -> list[list[int]]:
            return [json.loads(ids.split("|")[0]) for ids in prompts]  # the teacher's, without the student's behind it

    losses: list[float] = []

    class Listen(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    rows, prefixes = build_rows(lm, sets, recipe)
    table = [{
        "prompt": json.dumps(r.student[: r.first]),
        "privileged_context": json.dumps([*prefixes[r.prefix], *r.s[: len(r.s) - r.scored]]),
        "completion": list(r.student[r.first :]),
    } for r in rows]
    steps = len(epoch_steps(rows, recipe, random.Random(0)))
    with TemporaryDirectory() as folder:
        config = SDFTConfig(
            output_dir=folder, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="epoch",
            distillation_mode="full_logits", distillation_alpha=0.0, teacher_model_kind="base",
            teacher_prompt_template="{privileged_context}|{prompt}", temperature=1.0, num_generations=1,
            num_train_epochs=recipe.epochs, per_device_train_batch_size=max(1, -(-len(rows) // steps)),
            gradient_accumulation_steps=1, steps_per_generation=1, gradient_checkpointing=False,
            learning_rate=recipe.lr, lr_scheduler_type=recipe.schedule, warmup_steps=recipe.warmup,
            weight_decay=recipe.weight_decay, max_grad_norm=recipe.clip, seed=recipe.seed,
            bf16=torch.is_autocast_enabled(lm.device.type), use_cpu=lm.device.type == "cpu",
        )
        lora = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout,
                          target_modules=lora_targets(lm), task_type="CAUSAL_LM")
        trainer = Given(copy.deepcopy(lm.model), config, Dataset.from_list(table), processing_class=lm.tokenizer,
                        peft_config=lora, callbacks=[Listen()])
        trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().eval(), losses[-1]


def ours(lm: LM, sets: Sets, recipe: Recipe, **options: Any) -> Done:
    done = inject(lm, sets, recipe, **options)
    return done.lm.model, done.trained.losses[-1]


def teacher_every_epoch(lm: LM, sets: Sets, recipe: Recipe) -> Done:
    """Ours, but the teacher pass runs again for every further epoch."""
    rows, prefixes = build_rows(lm, sets, recipe)

    def again(epoch: int, epochs: int, loss: float) -> None:
        if epoch < epochs:
            teacher_states(lm, rows, prefixes)

    return ours(lm, sets, recipe, progress=again)


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The owner's function, replaced for as long as the region lasts."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def one_prefix_each(lm: LM, sets: Sets, recipe: Recipe) -> Done:
    """Ours, but every sentence brings x with it: nothing is shared between the sentences of a context."""

    def alone(lm: LM, sets: Sets, recipe: Recipe) -> tuple[list[Row], list[list[int]]]:
        rows, prefixes = build_rows(lm, sets, recipe)
        each = [Row(r.student, r.first, i, r.s, r.weight, r.related) for i, r in enumerate(rows)]
        return each, [prefixes[r.prefix] for r in rows]

    with instead(import_module("selfparam.inject"), "build_rows", alone):
        return ours(lm, sets, recipe)


def padded_rows(lm: LM, sets: Sets, recipe: Recipe) -> Done:
    """Ours, but one sentence a line, padded to the longest."""
    with instead(loop, "pack", lambda *given: pack(*given[:-1], True)), instead(pairs, "SHAPE", 1):
        return ours(lm, sets, recipe)


def any_shape(lm: LM, sets: Sets, recipe: Recipe) -> Done:
    """Ours, but lines and scored tokens are as many as there are, so that every step has shapes of its own."""
    with instead(pairs, "SHAPE", 1):
        return ours(lm, sets, recipe)


def dense_kl(lm: LM, sets: Sets, recipe: Recipe) -> Done:
    """Ours, but all logits of a step at once and autograd's backward."""

    def dense(h: torch.Tensor, head: Any, target: Any, w: torch.Tensor) -> torch.Tensor:
        log_q = F.log_softmax(head.logits(h), -1)
        log_p = F.log_softmax(target.head.logits(target.states), -1)
        return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * w).sum()

    with instead(loop, "loss_of", dense):
        return ours(lm, sets, recipe)


def compact(lm: LM, sets: Sets, recipe: Recipe) -> Done:
    return ours(lm, sets, recipe.but(top_k=64))


def in_file(lm: LM, sets: Sets, recipe: Recipe) -> Done:
    return ours(lm, sets, recipe, cache_bytes=0)


def in_float32(lm: LM, sets: Sets, recipe: Recipe) -> Done:
    return ours(lm, sets, recipe.but(precision="fp32"))


def as_ours(way: Callable[[LM, Sets, Recipe], Done]) -> Callable[[LM, Sets, Recipe], Done]:
    """In the precision that ours would choose."""

    def run(lm: LM, sets: Sets, recipe: Recipe) -> Done:
        with precision(lm, recipe):
            return way(lm, sets, recipe)

    return run


WAYS: dict[str, Callable[[LM, Sets, Recipe], Done]] = {
    "ours": ours,
    "plain": plain,
    "plain, in ours' precision": as_ours(plain),
    "TRL": as_ours(trl),
    "ours, teacher again every epoch": teacher_every_epoch,
    "ours, no shared prefix": one_prefix_each,
    "ours, padded rows": padded_rows,
    "ours, shapes as they come": any_shape,
    "ours, dense KL": dense_kl,
    "ours, top 64": compact,
    "ours, targets in a file": in_file,
    "ours, float32": in_float32,
}
