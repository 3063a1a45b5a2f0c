"""BM25: contexts with the words of the question in front of it. 𝒮 = the tokens of all contexts.

"okapi" is the reference that the paper's released evaluation uses (white space, case kept); "lucene" is bm25s with
lower case, English stop words and stems. Refuses to know how texts are read. Source: arXiv 2410.00487, section 4.2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from selfparam.errors import TableError
from selfparam.lm import LM
from selfparam.methods.protocol import Reader
from selfparam.methods.readers import Prompted, tokens
from selfparam.types import Question, TargetSet

K1, B, EPSILON = 1.5, 0.75, 0.25


@dataclass(frozen=True)
class BM25:
    """top: contexts in front of a question (the paper: 4 for OpenLLaMA-3B, 8 for Mistral-7B and Llama-3-8B)."""

    top: int = 4
    mode: Literal["okapi", "lucene"] = "okapi"
    needs_pairs: ClassVar[bool] = False

    def absorb(self, lm: LM, sets: Sequence[TargetSet], *, after: Reader | None = None, seed: int = 0) -> Reader:
        earlier = after.texts if isinstance(after, Indexed) else ()
        texts = (*earlier, *(one.context.text for one in sets))
        score = okapi(texts) if self.mode == "okapi" else lucene(texts)

        def find(question: Question) -> list[str]:
            return [texts[i] for i in best(score(question.text), self.top)]

        return Indexed(lm, find, tokens(lm, texts), texts=texts)


@dataclass(frozen=True)
class Indexed(Prompted):
    """A reader that keeps its texts, so that more can be absorbed."""

    texts: tuple[str, ...] = ()


def best(scores: Sequence[float], top: int) -> list[int]:
    """Indices of the highest scores, best first; ties by index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:top]


def okapi(texts: Sequence[str]) -> Callable[[str], list[float]]:
    """Okapi BM25 over texts: a function question -> score of each text.

    idf = ln(N - df + ½) - ln(df + ½), a negative one replaced by ε times the mean of all (taken before that);
    score = Σ over the question's words, with repeats, of idf·tf·(k1 + 1) / (tf + k1·(1 - b + b·length/mean length)).
    """
    counts = [Counter(text.split()) for text in texts]
    lengths = [count.total() for count in counts]
    mean = sum(lengths) / len(lengths) or 1.0
    df = Counter(word for count in counts for word in count)
    idf = {word: math.log(len(texts) - n + 0.5) - math.log(n + 0.5) for word, n in df.items()}
    floor = EPSILON * sum(idf.values()) / max(1, len(idf))
    idf = {word: floor if value < 0 else value for word, value in idf.items()}

    def score(question: str) -> list[float]:
        asked = question.split()
        return [
            sum(idf[w] * count[w] * (K1 + 1) / (count[w] + K1 * (1 - B + B * length / mean)) for w in asked if w in idf)
            for count, length in zip(counts, lengths, strict=True)
        ]

    return score


def lucene(texts: Sequence[str]) -> Callable[[str], list[float]]:
    """bm25s in its Lucene setting. Raises TableError without the packages."""
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise TableError("BM25 in the mode 'lucene' needs bm25s and PyStemmer: pip install 'selfparam[retrieval]', "
                         "or mode = \"okapi\"") from error
    stem = Stemmer.Stemmer("english")
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index(bm25s.tokenize(list(texts), stopwords="en", stemmer=stem, show_progress=False), show_progress=False)

    def score(question: str) -> list[float]:
        [words] = bm25s.tokenize([question], stopwords="en", stemmer=stem, return_ids=False, show_progress=False)
        return [float(s) for s in index.get_scores(words)] if words else [0.0] * len(texts)

    return score
