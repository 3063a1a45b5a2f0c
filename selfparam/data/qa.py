"""Question answering over contexts from JSONL: {"context", "question", "answers"} a line, plain or .gz -> Items.

Questions of one context text become one item, in the order of the file. Refuses to know models: lengths are counted by
a function that the caller gives. Source: the layout of many public sets; PwC has one of its own (pwc.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfparam.data.files import json_lines
from selfparam.data.items import Count, Item
from selfparam.errors import ContextError
from selfparam.types import Context, Question, content_hash

Row = tuple[str, str, tuple[str, ...]]


def words(text: str) -> int:
    """Tokens as white space separates them: the same for every model."""
    return len(text.split())


def row_of(line: dict[str, Any], where: str, context: str = "context", question: str = "question") -> Row:
    """(context, question, answers) of a line; "answers" (a list) or "answer" (a text). Raises ContextError."""
    given = line.get("answers", line.get("answer"))
    answers = given if isinstance(given, list) else [given]
    texts = [line.get(context), line.get(question), *answers]
    if not answers or any(not isinstance(t, str) or not t.strip() for t in texts):
        raise ContextError(f"{where}: '{context}', '{question}' and 'answers' must be texts: correct the line")
    return str(texts[0]), str(texts[1]), tuple(map(str, answers))


def rows_of_file(path: str | Path, only: Mapping[str, Sequence[Any]] | None = None) -> list[Row]:
    """All rows of a JSONL file (.gz too), or those whose fields have one of the values that `only` names.

    Raises DataError for a file that is no JSONL, ContextError for a line without a row.
    """
    wanted = (only or {}).items()
    return [row_of(line, where) for line, where in json_lines(path) if all(line.get(k) in v for k, v in wanted)]


def items_of(rows: Iterable[Row], source: str, *, answer_tokens: int | None = None, longest: int | None = None,
             count: Count = words, count_context: Count = words) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """Rows -> items in order of first appearance, and a note for whatever was left out.

    answer_tokens: rows whose shortest answer has more tokens by `count` are left out (the paper's filter: five).
    longest: contexts with more tokens by `count_context` are left out, for models with a small window.
    """
    grouped: dict[str, list[Question]] = {}
    left_rows, too_long = 0, set()
    for context, question, answers in rows:
        if answer_tokens is not None and min(map(count, answers)) > answer_tokens:
            left_rows += 1
        elif longest is not None and count_context(context) > longest:
            too_long.add(context)
        else:
            grouped.setdefault(context, []).append(Question(question, answers, content_hash(context)))
    notes = [f"{source}: {len(grouped)} contexts with {sum(map(len, grouped.values()))} questions"]
    if left_rows:
        notes.append(f"{source}: {left_rows} questions with answers of more than {answer_tokens} tokens left out")
    if too_long:
        notes.append(f"{source}: {len(too_long)} contexts of more than {longest} tokens left out")
    items = tuple(Item(Context(x, source=source), tuple(questions)) for x, questions in grouped.items())
    return items, tuple(notes)
