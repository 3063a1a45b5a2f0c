"""One injection on several GPUs (or CPU processes): they share the rows of every step and end with the same weights.

    selfparam targets MODEL notes.txt --out sets.jsonl
    accelerate launch --num_processes 2 several_devices.py MODEL sets.jsonl OUT
    accelerate launch --num_processes 2 several_devices.py MODEL sets.jsonl OUT --shard   # it does not fit one device
    torchrun --nproc_per_node 2 several_devices.py MODEL sets.jsonl OUT          # CPU processes

--shard: the layers are cut over the processes (FSDP), and every process reads every context. Losses and weights are
those of one process to float tolerance; only the main process writes. Refuses to know how the work is divided.
Source: SELF-PARAM, arXiv 2410.00487, Eq. 2; accelerate and torch do the work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from accelerate import Accelerator

from selfparam import LM, PAPER, inject
from selfparam.inject.sharded import save_sharded, shard
from selfparam.targets import read_sets


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Inject target sets on several devices.")
    parser.add_argument("model", help="model directory or hub name")
    parser.add_argument("sets", help="target sets, as 'selfparam targets' writes them")
    parser.add_argument("out", help="directory for the new weights")
    parser.add_argument("--recipe", type=json.loads, default={}, help='changes of the paper\'s, as in {"epochs": 10}')
    parser.add_argument("--shard", action="store_true", help="for a model that does not fit one device")
    args = parser.parse_args(argv)
    accelerator = Accelerator()
    lm = LM.load(args.model, device="cpu" if args.shard else str(accelerator.device))
    lm = shard(lm, accelerator) if args.shard else lm
    done = inject(lm, read_sets(args.sets), PAPER.but(**args.recipe), in_place=True, accelerator=accelerator)
    if args.shard:
        save_sharded(done.lm, args.out, accelerator)
    elif accelerator.is_main_process:
        done.lm.save(args.out)
    if accelerator.is_main_process:
        print(json.dumps({"processes": accelerator.num_processes, "losses": done.trained.losses}))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # all is written; threads of torch's communication at times abort the interpreter's own ending
