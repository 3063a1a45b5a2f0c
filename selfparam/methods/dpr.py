"""DPR: contexts whose vectors are nearest to the question's, in front of it. 𝒮 = the tokens of all contexts.

One context is one document; inner products through faiss. Refuses to know how texts are read.
Source: arXiv 2410.00487, section 4.2; arXiv 2004.04906.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

from selfparam.errors import TableError
from selfparam.lm import LM
from selfparam.methods.bm25 import Indexed
from selfparam.methods.encoders import MINILM, Encode, load_encoder
from selfparam.methods.protocol import Reader
from selfparam.methods.readers import tokens
from selfparam.types import Question, TargetSet


@dataclass(frozen=True)
class DPR:
    """top as in BM25. The paper's encoders: facebook/dpr-{question,ctx}_encoder-single-nq-base (or -multiset-base)."""

    top: int = 4
    question_encoder: str = MINILM
    context_encoder: str = MINILM
    needs_pairs: ClassVar[bool] = False

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0) -> Reader:
        """Raises TableError for an encoder or a package that is missing."""
        earlier = after.texts if isinstance(after, Indexed) else ()
        texts = (*earlier, *(one.context.text for one in sets))
        search = Nearest(texts, encoder(self.context_encoder, "context"), encoder(self.question_encoder, "question"))

        def find(question: Question) -> list[str]:
            return [texts[i] for i in search.best(question.text, self.top)]

        notes = [f"encoders: {self.question_encoder}, {self.context_encoder}"]
        return Indexed(lm, find, tokens(lm, texts), notes=notes, texts=texts)


@lru_cache(maxsize=4)
def encoder(name: str, side: Literal["question", "context"]) -> Encode:
    """Loaded once in a process."""
    return load_encoder(name, side)


class Nearest:
    """An index of texts by inner product, exact."""

    def __init__(self, texts: Sequence[str], encode_context: Encode, encode_question: Encode) -> None:
        try:
            import faiss
        except ImportError as error:
            raise TableError("DPR needs faiss: pip install 'selfparam[retrieval]'") from error
        vectors = encode_context(texts)
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)
        self._encode = encode_question

    def best(self, question: str, top: int) -> list[int]:
        """Indices of the nearest texts, nearest first."""
        _, found = self._index.search(self._encode([question]), min(top, self._index.ntotal))
        return [int(i) for i in found[0]]
