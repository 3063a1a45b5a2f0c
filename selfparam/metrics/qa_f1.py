"""QA-F1: how many words an answer shares with the right one, and its mean over contexts.

The English QA-F1 of LongBench, to the last digit: curly quotes and dashes stay, hyphenated words join, "3.5" equals
"35", and empty against empty is 0. Refuses to know models, files and questions.
Source: LongBench (arXiv 2308.14508), the metric of SELF-PARAM's Table 1 and 2 (arXiv 2410.00487).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def tokens(text: str) -> list[str]:
    """The words that F1 compares: lower case, ASCII punctuation deleted, articles left out, split at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def qa_f1(prediction: str, answers: Iterable[str]) -> float:
    """F1 in [0, 1] of the word multisets, the maximum over the reference answers; 0 without references."""
    if isinstance(answers, str):
        raise TypeError("answers is one string: give a list of reference answers")
    predicted = tokens(prediction)
    return max((_f1(predicted, tokens(answer)) for answer in answers), default=0.0)


def _f1(predicted: list[str], right: list[str]) -> float:
    shared = sum((Counter(predicted) & Counter(right)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(right)
    return 2 * precision * recall / (precision + recall)


def mean_f1(scores_by_context: Mapping[str, Sequence[float]]) -> float:
    """Mean over contexts of each context's mean score: {context id: scores of its questions} -> F1 in [0, 1].

    A context weighs the same however many questions it has. Raises ValueError where there is no score to average.
    """
    if not scores_by_context or not all(scores_by_context.values()):
        raise ValueError("no scores to average: give at least one score for each context")
    means = [sum(scores) / len(scores) for scores in scores_by_context.values()]
    return sum(means) / len(means)
