"""RAPTOR: a tree of summaries over all contexts; the nearest nodes of any layer go in front of the question.

𝒮 = the tokens of all nodes. Clusters are in clusters.py, summaries in summaries.py, vectors in encoders.py. Refuses to
know how texts are read. Source: arXiv 2401.18059 (collapsed tree); arXiv 2410.00487, section 4.2 (top-1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from selfparam.lm import LM
from selfparam.methods.bm25 import Indexed
from selfparam.methods.clusters import DIMENSION, Cluster, clusters
from selfparam.methods.dpr import encoder
from selfparam.methods.encoders import MINILM, Encode
from selfparam.methods.protocol import Reader
from selfparam.methods.readers import tokens
from selfparam.methods.summaries import Summarise, by_endpoint, by_model, local
from selfparam.types import Question, TargetSet

LEAF_TOKENS, LAYERS, LONGEST = 100, 5, 3500


@dataclass(frozen=True)
class Raptor:
    """summariser: "self", a model directory or hub name, or (with endpoint = its address or "openai") a model there."""

    top: int = 1
    encoder: str = MINILM
    summariser: str = "self"
    endpoint: str | None = None
    needs_pairs: ClassVar[bool] = False

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0) -> Reader:
        """One tree over all contexts so far. Raises TableError for a package that is missing, AuthorError."""
        texts = (*(after.texts if isinstance(after, Indexed) else ()), *(one.context.text for one in sets))
        encode = encoder(self.encoder, "context")

        def length(text: str) -> int:
            return len(lm.encode(text))

        nodes = tree([leaf for text in texts for leaf in leaves(text, length)], encode, self._summarise(lm), length)
        vectors = unit(encode(nodes))

        def find(question: Question) -> list[str]:
            return nearest_nodes(unit(encode([question.text]))[0], vectors, nodes, self.top, length)

        notes = [f"encoder: {self.encoder}; summaries by {self.summariser}; {len(nodes)} nodes"]
        return Indexed(lm, find, tokens(lm, nodes), notes=notes, texts=texts)

    def _summarise(self, lm: LM) -> Summarise:
        if self.endpoint:
            return by_endpoint(self.summariser, None if self.endpoint == "openai" else self.endpoint)
        return by_model(lm if self.summariser in ("self", lm.name) else local(self.summariser))


def leaves(text: str, length: Callable[[str], int], most: int = LEAF_TOKENS) -> list[str]:
    """Pieces of at most `most` tokens, filled greedily with sentences; a longer sentence is split at , ; : first.

    The delimiters go. A part without any of them may still be longer.
    """
    parts: list[str] = []
    for sentence in _split(r"[.!?\n]", text):
        parts += _filled(_split("[,;:]", sentence), length, most) if length(" " + sentence) > most else [sentence]
    return _filled(parts, length, most)


def _split(pattern: str, text: str) -> list[str]:
    return [piece.strip() for piece in re.split(pattern, text) if piece.strip()]


def _filled(parts: Sequence[str], length: Callable[[str], int], most: int) -> list[str]:
    """Neighbouring parts joined by a space, as many as `most` tokens allow (each counted as " " + part)."""
    found: list[list[str]] = []
    used = 0
    for part in parts:
        size = length(" " + part)
        if not found or used + size > most:
            found.append([])
            used = 0
        found[-1].append(part)
        used += size
    return [" ".join(piece) for piece in found]


def tree(leaf_texts: Sequence[str], encode: Encode, summarise: Summarise, length: Callable[[str], int],
         cluster: Cluster = clusters) -> list[str]:
    """Texts of all nodes, layer by layer: the leaves, then a summary of each cluster, at most LAYERS times.

    Ends when a layer is small enough to be read at once, or when clustering no longer makes it smaller.
    """
    layer, nodes = list(leaf_texts), list(leaf_texts)
    for _ in range(LAYERS):
        if len(layer) <= DIMENSION + 1:
            break
        groups = cluster(encode(layer), [length(text) for text in layer])
        if len(groups) >= len(layer):
            break
        layer = summarise([[layer[i] for i in members] for members in groups])
        nodes += layer
    return nodes


def unit(vectors: Any) -> Any:
    """Rows of length 1, so that inner products are cosines."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def nearest_nodes(question: Any, vectors: Any, nodes: Sequence[str], top: int,
                  length: Callable[[str], int]) -> list[str]:
    """At most `top` nodes, nearest first, up to the first that would go beyond LONGEST tokens."""
    found: list[str] = []
    used = 0
    for i in np.argsort(-(vectors @ question), kind="stable")[:top]:
        used += length(nodes[i])
        if used > LONGEST:
            break
        found.append(nodes[i])
    return found
