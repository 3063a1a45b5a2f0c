"""inject(θ, ℰ, recipe) -> θ': the method in one call.

Teacher first, from the weights that are then trained; then the loop; then merge, and the merged weights must agree with
the trained ones. FT(C) and FT(S) are the same call with next-word loss and other sentences. Refuses to know files and
authors. Source: arXiv 2410.00487, section 3 and A.2.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from selfparam.errors import InjectionError, VerificationError
from selfparam.inject.checkpoint import Checkpoints
from selfparam.inject.curvature import Curvature, Held, measure
from selfparam.inject.loop import EpochProgress, Trained, line_width, scored_in_epoch, train
from selfparam.inject.memory import CACHE_BYTES, Kept, Tensors
from selfparam.inject.objective import Target, Words, kl_tokens
from selfparam.inject.pairs import Row, build_rows, pack
from selfparam.inject.sharded import is_sharded, replicate
from selfparam.inject.teacher import as_target, check_model, check_rows, head_of, teacher_targets
from selfparam.inject.trainable import lean, make_trainable, multiplies_bf16
from selfparam.lm import LM
from selfparam.own import own_sentences
from selfparam.types import Context, Recipe, Sentence, TargetSet

#: Largest mean KL (nats per token) between the trained student and its merged weights.
MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}

SHORT = (torch.bfloat16, torch.float16)  # too coarse for weights that are trained themselves


@dataclass(frozen=True)
class Injection:
    """θ' and how it came about. `merge_error`: mean KL trained -> merged; `adapter`: the LoRA weights if kept.

    curvature: for the next injection, where the recipe has retention.
    """

    lm: LM
    trained: Trained
    rows: int
    seconds_teacher: float
    seconds_train: float
    merge_error: float
    adapter: tuple[Any, dict[str, torch.Tensor]] | None = None
    curvature: Curvature | None = None


def precision(lm: LM, recipe: Recipe) -> AbstractContextManager[Any]:
    """bf16 autocast where the recipe asks for it or (auto) where the hardware multiplies bf16 matrices."""
    fast = multiplies_bf16(lm.device) and lm.model.dtype == torch.float32
    if recipe.precision == "bf16" or (recipe.precision == "auto" and fast):
        # no cache of cast weights: it would hide the updates inside one region
        return torch.autocast(lm.device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


def clock(device: torch.device) -> float:
    """Seconds, read when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def inject(
    lm: LM,
    target_sets: Sequence[TargetSet],
    recipe: Recipe,
    *,
    teacher: LM | None = None,
    curvature: Curvature | None = None,
    known: Sequence[Sentence] | None = None,
    progress: EpochProgress | None = None,
    teacher_progress: Callable[[int, int], None] | None = None,
    in_place: bool = False,
    keep_adapter: bool = False,
    checkpoints: Checkpoints | None = None,
    cache_bytes: int = CACHE_BYTES,
    accelerator: Accelerator | None = None,
) -> Injection:
    """Write the contexts of the target sets into the weights.

    lm stays as it is unless in_place (saves one copy of the weights; after an error it is half trained: load it again).
    teacher: another θ to read x than lm itself (in a
    sequence of injections, the first one, with the same output head); what is rehearsed is always lm's own.
    curvature: of the injections before, which the recipe's retention holds. known: where there is none, sentences that
    are held from here on, together as firmly as an epoch is learned (None: the model writes recipe.known of them).
    checkpoints: where to save and continue. cache_bytes: the teacher's targets may take so much memory (the device's,
    where there is one); more goes to a file under TMPDIR. accelerator: share the work among its processes, which all
    call this with the same arguments and get the same θ'. lm may be cut over them (sharded.py).
    16-bit weights are trained in float32, all of them for that time, and rounded at the end, unless LoRA is trained.
    Raises InjectionError (nothing to train on, a row beyond the window, a loss that is not finite, memory too short,
    another teacher with another output head while something is rehearsed),
    StoppedError (`checkpoints` was told to stop), OutputError (that file cannot be written) and VerificationError
    (merged or rounded weights disagree with the trained ones).
    """
    if accelerator and checkpoints:
        raise InjectionError("checkpoints are for one process: leave them out with several")
    if is_sharded(lm.model) and not (in_place and accelerator and recipe.train in ("lora", "mlp") and not teacher):
        raise InjectionError("a model that is cut over processes is trained in place, as LoRA or MLP matrices, and is "
                             "its own teacher: in_place=True, accelerator=…, train 'lora' or 'mlp'")
    if recipe.retention and recipe.train not in ("lora", "mlp"):
        raise InjectionError(f"earlier injections cannot be held with train = '{recipe.train}': use 'lora' or 'mlp', "
                             "or --retention 0")
    if recipe.retention and is_sharded(lm.model):
        raise InjectionError("what was learned before cannot be held in a model that is cut over processes: "
                             "use --retention 0")
    short = recipe.train != "lora" and any(p.dtype in SHORT for p in lm.model.parameters())
    if short and is_sharded(lm.model):
        raise InjectionError("16-bit weights that are cut over processes cannot be trained themselves: load the model "
                             "with dtype float32 (its products are in bf16), or train 'lora'")
    check_model(lm, recipe)
    if teacher:
        check_rows(teacher)
    rows, prefixes = build_rows(lm, target_sets, recipe)
    if teacher and any(r.rehearsed for r in rows) and not torch.equal(head_of(teacher).weight, head_of(lm).weight):
        raise InjectionError("the teacher has another output head than the model that rehearses: train LoRA or MLP "
                             "matrices, or do without rehearsal (--rehearsal 0)")
    if known is None and not curvature:
        known = own_sentences(lm, recipe)
    student = lm if in_place else replace(lm, model=copy.deepcopy(lm.model))
    kinds = {name: p.dtype for name, p in student.model.named_parameters() if short and p.dtype in SHORT}
    for name in kinds:
        p = student.model.get_parameter(name)
        p.data = p.data.float()  # in 16 bits most steps would be rounded to nothing
    cuda = [student.device] if student.device.type == "cuda" else []
    kept = Kept(student.device, cache_bytes)
    with torch.random.fork_rng(devices=cuda), precision(student, recipe), kept:
        torch.manual_seed(recipe.seed)
        begin = clock(student.device)
        if checkpoints:
            checkpoints.about(student.model, rows, recipe, teacher and teacher.model,
                              curvature.directions if curvature else None, known)
        if known and recipe.retention and not curvature:
            own, _ = build_rows(lm, [TargetSet(Context(""), (), tuple(known))], recipe)
            curvature = measure(student, own, recipe.seed).weighing(scored_in_epoch(rows, recipe))
        targets: Target
        if recipe.objective == "kl":

            def read() -> Tensors:
                return teacher_targets(
                    teacher or student, rows, prefixes, kept, recipe.top_k, teacher_progress, accelerator, student)

            tensors = kept.placed(checkpoints.teacher(read) if checkpoints else read())
            targets = as_target(tensors, head_of(teacher or student), copy=recipe.train == "full")
        else:
            targets = next_words(student, rows)
        taught = clock(student.device)
        model = make_trainable(student, recipe)
        if accelerator:  # equal weights, different dropout
            torch.manual_seed(recipe.seed + accelerator.process_index)
        with lean(model, line_width(lm, rows)):
            held = Held(model, curvature, recipe) if curvature and recipe.retention else None
            trained = train(student, model, rows, targets, recipe, progress, checkpoints, accelerator, held)
        done = clock(student.device)
    adapter = _adapter_of(model) if keep_adapter and recipe.train == "lora" else None
    merge_error = merge(student, model, rows, kinds) if short or recipe.train in ("lora", "osf") else 0.0
    student.model.requires_grad_(True)
    student.model.eval()
    if recipe.retention:
        with precision(student, recipe):
            curvature = measure(student, [r for r in rows if r.related], recipe.seed, curvature)
    return Injection(student, trained, len(rows), taught - begin, done - taught, merge_error, adapter,
                     curvature if recipe.retention else None)


def next_words(lm: LM, rows: Sequence[Row]) -> Words:
    """What next-word prediction is trained on: the ids of all scored tokens."""
    return Words(torch.tensor([i for r in rows for i in r.student[r.first :]], device=lm.device))


def _adapter_of(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    from peft import get_peft_model_state_dict

    return model.peft_config["default"], {
        k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(model).items()
    }


@torch.no_grad()
def _states(lm: LM, model: Any, rows: Sequence[Row]) -> torch.Tensor:
    starts = [0] * len(rows)
    packed = pack(rows, range(len(rows)), starts, 1, lm.pad, lm.apart).to(lm.device)
    return lm.hidden(model, input_ids=packed.ids, position_ids=packed.position_ids).flatten(0, 1)[packed.index]


@torch.no_grad()
def merge(lm: LM, model: Any, rows: Sequence[Row], kinds: dict[str, torch.dtype] | None = None) -> float:
    """Merge the adapters into lm's weights and compare: mean KL in nats per token over up to 16 rows.

    kinds: types that weights are then rounded to, by their names. Raises VerificationError where they disagree.
    """
    probe = rows[:: max(1, len(rows) // 16)][:16]
    head = head_of(lm).frozen(copy=bool(kinds))
    before = _states(lm, model, probe)
    if is_sharded(model):
        replicate(model)
    if model is not lm.model:
        lm.model = model.merge_and_unload()
    for name, kind in (kinds or {}).items():
        p = lm.model.get_parameter(name)
        p.data = p.data.to(kind)
    after = _states(lm, lm.model, probe)
    error = float(kl_tokens(after, head_of(lm), before, head).mean())
    tolerance = MERGE_TOLERANCE.get(lm.model.dtype, 2e-2)
    if not error <= tolerance:
        raise VerificationError(
            f"merged weights differ from the trained ones by {error:.2g} nats per token (limit {tolerance:g}): "
            "load the model with dtype float32"
        )
    return error
