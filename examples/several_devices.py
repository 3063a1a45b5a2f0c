"""One injection on several GPUs (or CPU processes): they share the rows of every step and end with the same weights.

    selfparam targets MODEL notes.txt --out sets.jsonl
    accelerate launch --num_processes 2 several_devices.py MODEL sets.jsonl OUT
    torchrun --nproc_per_node 2 several_devices.py MODEL sets.jsonl OUT          # CPU processes

The model must fit one device. Losses and weights are those of one process to float tolerance; only the main process
writes. Refuses to know how the work is divided. Source: SELF-PARAM, arXiv 2410.00487, Eq. 2; accelerate does the work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from accelerate import Accelerator

from selfparam import LM, PAPER, inject
from selfparam.targets import read_sets


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Inject target sets on several devices.")
    parser.add_argument("model", help="model directory or hub name")
    parser.add_argument("sets", help="target sets, as 'selfparam targets' writes them")
    parser.add_argument("out", help="directory for the new weights")
    parser.add_argument("--recipe", type=json.loads, default={}, help='changes of the paper\'s, as in {"epochs": 10}')
    args = parser.parse_args(argv)
    accelerator = Accelerator()
    lm = LM.load(args.model, device=str(accelerator.device))
    done = inject(lm, read_sets(args.sets), PAPER.but(**args.recipe), in_place=True, accelerator=accelerator)
    if accelerator.is_main_process:
        done.lm.save(args.out)
        print(json.dumps({"processes": accelerator.num_processes, "losses": done.trained.losses}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
