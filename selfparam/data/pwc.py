"""PwC, the paper's question-answering set: from the hub (`sggetao/PwC`, split "test") or a local JSONL -> rows.

Fields input, prompt, answer on the hub; a local file may also use context, question, answers. The filter "answers of at
most five tokens" and the grouping by context are those of qa.py. Refuses to know models.
Source: arXiv 2410.00487, section 4.1 (1,581 contexts and 3,353 questions are left); PwC is from arXiv 2307.06945.
"""

from __future__ import annotations

from selfparam.data.files import json_lines
from selfparam.data.qa import Row, row_of
from selfparam.errors import ContextError

HUB = "sggetao/PwC"
ANSWER_TOKENS = 5


def rows(path: str | None = None) -> list[Row]:
    """All rows, in their order: of the file, or of the hub's test split. Raises ContextError."""
    if path:
        lines = list(json_lines(path))
    else:
        try:
            from datasets import load_dataset

            lines = [(dict(row), f"{HUB} row {i}") for i, row in enumerate(load_dataset(HUB, split="test"))]
        except Exception as error:  # a missing package, or one of the many kinds that the hub client raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise ContextError(
                f"cannot load {HUB} ({reason}): pip install 'selfparam[hub]' and a network, or a file as data.path"
            ) from error
    return [
        row_of(line, where, "input", "prompt") if "input" in line else row_of(line, where) for line, where in lines
    ]
