"""A model that does not fit one device: its layers are cut over all processes and gathered one at a time (FSDP).

Embeddings, the last norm and the output head stay whole on every device, because the loss reads the head by itself;
LoRA adapters, which are small, too. Refuses to know rows and losses.
Source: torch's fully_shard, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from selfparam.errors import ModelError
from selfparam.lm import LM


def shard(lm: LM, accelerator: Accelerator) -> LM:
    """Cut the layers of the model (loaded on the CPU) over the processes, in place; every process calls it.

    Afterwards every forward pass is one of all processes together. Raises ModelError where transformers does not say
    which modules the model's layers are.
    """
    kinds = set(getattr(lm.model, "_no_split_modules", None) or ())
    layers = [m for m in lm.model.modules() if type(m).__name__ in kinds]
    if not layers:
        raise ModelError(f"cannot tell the layers of '{lm.name}': use one process, or a device that it fits")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)  # each is its own root, which would stay whole
        layer.set_gradient_divide_factor(1.0)  # the sum: each process has its part of the step's loss
        layer.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    lm.model.to(accelerator.device)
    return lm


def is_sharded(model: Any) -> bool:
    """Whether any of its weights is cut over processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def replicate(model: Any) -> None:
    """Adapters in the form in which they can be added to weights that are cut: the same numbers, whole everywhere."""
    mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.requires_grad and not isinstance(p, DTensor):
                whole = DTensor.from_local(p.data, mesh, [Replicate()])
                setattr(module, name, torch.nn.Parameter(whole))


def save_sharded(lm: LM, folder: str | Path, accelerator: Accelerator) -> None:
    """Write the model as `LM.save` does; every process calls it, the main one writes. Raises OutputError."""
    state = {}
    for name, value in lm.model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value  # one weight at a time, by all processes
        if accelerator.is_main_process:
            state[name] = whole.cpu()
    if accelerator.is_main_process:
        lm.save(folder, state)
