"""Which weights are trained: LoRA (the paper's configuration), MLP matrices only, all, or peft's orthogonal subspace.

Target modules are derived from the model, not from a list of architectures: every linear module of a decoder layer
except the attention's last one (the paper's set q, k, v, up, down, gate), and the experts of a mixture. Refuses to know
rows and losses.
Sources: arXiv 2410.00487, A.2; OSF is a method of continual learning, arXiv 2504.07097.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear

from selfparam.errors import ModelError
from selfparam.inject.sharded import is_sharded
from selfparam.lm import LINEAR, LM, Conv1D
from selfparam.types import Recipe

SHORT_LINE = 256  # tokens of a packed line up to which scores that are spelled out are faster (docs/LOG.md)


@torch.no_grad()
def layer_linears(lm: LM) -> tuple[list[str], list[str]]:
    """Full names of (attention input, MLP) matrices, found by watching one forward pass. Raises ModelError.

    What has a convolution over tokens beside it (recurrent layers) counts as attention.
    """
    if odd := set(_stacked(lm)) - set(experts(lm)):
        raise ModelError(f"'{min(odd)}' of '{lm.name}' is neither a matrix nor known as experts: train the full model "
                         "instead")
    names = {m: n for n, m in lm.model.named_modules() if isinstance(m, LINEAR)}
    head = lm.model.get_output_embeddings()
    order: list[str] = []

    def passed(module: torch.nn.Module, _: Any, y: Any) -> None:
        if isinstance(y, torch.Tensor):  # a router is no matrix product, even if it is one of linear modules
            order.append(names[module])

    hooks = [m.register_forward_hook(passed) for m in names if m is not head]
    try:
        lm.model(input_ids=torch.tensor([lm.bos * 2], device=lm.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    attention: list[str] = []
    mlp: list[str] = []
    for name in order:
        parent = name.rpartition(".")[0]
        mixes = any(isinstance(m, torch.nn.Conv1d) for m in lm.model.get_submodule(parent).children())
        own = parent.rpartition(".")[2]
        (attention if mixes or "attn" in own or "attention" in own else mlp).append(name)
    if not attention or not (mlp or experts(lm)):
        raise ModelError(f"cannot tell attention from MLP matrices in '{lm.name}': train the full model instead")
    last = {name.rsplit(".", 1)[0]: name for name in attention}  # a module's last matrix projects the output
    return [n for n in attention if n not in last.values()], mlp


def experts(lm: LM) -> list[str]:
    """Full names of the weights [experts, …] that are a matrix for each expert of a mixture."""
    return [name for name in _stacked(lm) if "expert" in name or "moe" in name]


def _stacked(lm: LM) -> list[str]:
    """Full names of weights that are several matrices, convolutions apart."""
    return [f"{name}.{own}" for name, m in lm.model.named_modules() if not isinstance(m, torch.nn.Conv1d)
            for own, p in m.named_parameters(recurse=False) if p.ndim == 3 and len(p) > 1]


def lora_targets(lm: LM) -> list[str]:
    """Names for peft: short ones (q_proj, …) where they select exactly the wanted modules, else full names."""
    attention, mlp = layer_linears(lm)
    wanted = {*attention, *mlp}
    short = sorted({n.rsplit(".", 1)[-1] for n in wanted})
    selected = {n for n, _ in lm.model.named_modules() if n.rsplit(".", 1)[-1] in short}
    return short if selected == wanted else sorted(wanted)


def make_trainable(lm: LM, recipe: Recipe) -> Any:
    """The model to train: a peft model for LoRA and OSF, otherwise lm.model with gradients where the recipe says.

    A LoRA on experts has no dropout, which peft does not have for them.
    OSF: the upper half of every matrix's singular values is held, gradients of the rest are made orthogonal to it.
    Raises ModelError for a model whose layers OSF does not know.
    """
    lm.model.requires_grad_(recipe.train == "full")
    if recipe.train == "mlp":
        for name in layer_linears(lm)[1]:
            lm.model.get_submodule(name).requires_grad_(True)
        for name in experts(lm):
            lm.model.get_parameter(name).requires_grad_(True)
    if recipe.train in ("mlp", "full"):
        return lm.model
    if recipe.train == "osf" and any(isinstance(m, Conv1D) for m in lm.model.modules()):
        raise ModelError(f"peft's orthogonal subspace does not know the layers of '{lm.name}': use another --train")
    config: PeftConfig = OSFConfig(target_modules=lora_targets(lm)) if recipe.train == "osf" else LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0 if experts(lm) else recipe.lora_dropout,
        target_modules=lora_targets(lm),
        target_parameters=experts(lm) or None,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in lm.model.modules()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
        return get_peft_model(lm.model, config)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are faster there than in float32. On other CPUs they are a hundred times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class Float32Muon(torch.optim.Muon):
    """torch's Muon with its products, which are in bf16 whatever the weights are, in float32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; a closure is not called."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum_buffer"], group["momentum"] if group["nesterov"] else 1.0)
                size = max(1.0, len(p) / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(_orthogonal(update.float(), group).to(p), alpha=-size * group["lr"])


def make_muon(matrices: list[torch.nn.Parameter], **settings: Any) -> torch.optim.Muon:
    """torch's, or the one in float32 where bf16 products are slow."""
    return (torch.optim.Muon if multiplies_bf16(matrices[0].device) else Float32Muon)(matrices, **settings)


def _orthogonal(x: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Muon's Newton-Schulz iteration."""
    if len(x) > x.shape[1]:
        return _orthogonal(x.T, group).T
    a, b, c = group["ns_coefficients"]
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def make_optimizers(parameters: list[torch.nn.Parameter], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for matrices and AdamW for the rest."""
    matrices = [p for p in parameters if p.ndim == 2] if recipe.optimizer == "muon" else []
    ids = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in ids]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(make_muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay))
    if rest:
        found.append(torch.optim.AdamW(rest, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True))
    return found


def apply(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Take a step with the learning rate lr, and clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextmanager
def lean(model: Any, width: int) -> Iterator[None]:
    """Nothing is computed in every step that is needed once. The numbers stay, to rounding.

    Adapters take their input as it comes, and their scaling and sum are part of the matrix product. Inside autocast
    copies of frozen matrices are made once, and on a CPU packed lines of `width` tokens, if short, are attended to with
    the scores spelled out: the backward pass of its fused attention takes three times as long in bf16. Afterwards all
    is as it was; nothing to do where weights are cut over processes, or are not float32 without autocast.
    """
    kind = model.device.type
    cast = torch.is_autocast_enabled(kind)
    if is_sharded(model) or not (cast or model.dtype == torch.float32):
        yield
        return
    head = model.get_output_embeddings()
    matrices = [m.weight for m in model.modules() if isinstance(m, LINEAR) and m is not head]
    frozen = [w for w in matrices if cast and not w.requires_grad]
    kept = [w.data for w in frozen]
    adapted = [m for m in model.modules() if isinstance(m, Linear) and _simple(m)]
    spelled = cast and kind == "cpu" and width <= SHORT_LINE and model.config._attn_implementation == "sdpa"
    try:
        for w in frozen:
            w.data = w.data.to(torch.get_autocast_dtype(kind))
        for m in adapted:
            m.forward = partial(_adapted, m)
        if spelled:
            model.set_attn_implementation("eager")
        with disable_input_dtype_casting(model) if adapted else nullcontext():  # it knows LoRA only
            yield
    finally:
        if spelled:
            model.set_attn_implementation("sdpa")
        for m in adapted:
            del m.forward
        for w, data in zip(frozen, kept, strict=True):
            w.data = data


def _simple(layer: Any) -> bool:
    """Whether a LoRA module does nothing but W x + b + s · B A x."""
    return not layer.lora_variant and all(isinstance(m, torch.nn.Identity) for m in layer.lora_dropout.values())


def _adapted(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What the LoRA module gives for x [..., in], with one product for s · B (A x) and the sum."""
    y = layer.base_layer(x)
    a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    low = torch.nn.functional.linear(x.flatten(0, -2), a)
    return torch.addmm(y.flatten(0, -2), low, b.mT, alpha=layer.scaling["default"]).view_as(y)
