"""Settings for every test: no hub, no tokenizer threads, two cores (or as many as OMP_NUM_THREADS says)."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)
