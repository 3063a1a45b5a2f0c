"""Two CPU processes (gloo) train what one process trains: the same losses and weights to float tolerance."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfparam.errors import InjectionError
from selfparam.inject import inject
from selfparam.inject.checkpoint import Checkpoints
from selfparam.targets import write_sets
from selfparam.types import PAPER, Context, Sentence, TargetSet
from tests.tiny import tiny_lm

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "several_devices.py"
CHANGES = {"epochs": 3, "lr": 1e-2, "lora_dropout": 0.0, "precision": "fp32", "batch_tokens": 60, "held_out": 0.2,
           "top_k": 8, "unrelated_weight": 0.3}


def sets() -> list[TargetSet]:
    found = []
    for name in ("Mara", "Tom", "Ann"):
        x = Context(f"{name} keeps the red lamp on the hill of {name}.")
        related = tuple(Sentence(f"What is {i} of {name}?", f"{name} {i}", x.id) for i in range(3))
        found.append(TargetSet(x, related, (Sentence("", f"{name} came back in the evening."),)))
    return found


@pytest.mark.parametrize(("options", "changes"), [
    ([], {}), (["--shard"], {}), (["--shard"], {"train": "mlp"}), (["--shard"], {"train": "mlp", "optimizer": "muon"}),
], ids=["whole", "lora", "mlp", "muon"])
def test_two_processes_equal_one(options: list[str], changes: dict[str, str], tmp_path: Path) -> None:
    lm = tiny_lm()
    lm.save(tmp_path / "model")
    write_sets(tmp_path / "sets.jsonl", sets())
    one = inject(lm, sets(), PAPER.but(**CHANGES | changes))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT),
        str(tmp_path / "model"), str(tmp_path / "sets.jsonl"), str(tmp_path / "out"),
        "--recipe", json.dumps(CHANGES | changes), *options,
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent.parent, env=environment)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == 1 and said[0]["processes"] == 2  # only the main process speaks
    muon = "optimizer" in changes  # it may round to bf16, and blows up what is next to nothing in a gradient
    assert said[0]["losses"] == pytest.approx(one.trained.losses, rel=1e-3 if muon else 1e-4)
    weights, expected = load_file(tmp_path / "out" / "model.safetensors"), one.lm.model.state_dict()
    assert weights.keys() <= expected.keys()
    assert muon or all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in weights)
    assert not all(torch.equal(weights[name], lm.model.state_dict()[name]) for name in weights)


def test_checkpoints_are_for_one_process(tmp_path: Path) -> None:
    from accelerate import Accelerator

    with pytest.raises(InjectionError, match="for one process"):
        inject(tiny_lm(), sets(), PAPER, accelerator=Accelerator(cpu=True), checkpoints=Checkpoints(tmp_path))
