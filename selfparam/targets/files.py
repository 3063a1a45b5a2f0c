"""Target sets on disk: JSONL that a person reads, edits and hands back, one's own pairs, a cache of what was written.

A line with "text" is a context, the lines below it are its sentences. Refuses to know who writes and who trains.
Source: SELF-PARAM, arXiv 2410.00487, section 3.2; the layout is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from selfparam.data.files import json_lines, write_json_lines, write_text
from selfparam.errors import OutputError, TargetError
from selfparam.targets.authors import Author
from selfparam.targets.parse import Report, plain, stands_in
from selfparam.types import Context, Sentence, TargetSet, content_hash

Written = tuple[tuple[Sentence, ...], Report]

_AT_ONCE = 64  # contexts between two savings of the cache: what a failure of the author can cost


def write_sets(path: str | Path, sets: Sequence[TargetSet]) -> None:
    """Write target sets as JSONL, whole or not at all. Raises OutputError."""
    lines: list[dict[str, Any]] = []
    for one in sets:
        x = one.context
        lines.append({"id": x.id, "title": x.title, "source": x.source, "text": x.text, "author": one.author})
        lines += [{"context": x.id, **_line(s)} for s in (*one.related, *one.unrelated)]
    write_json_lines(path, lines)


def _line(sentence: Sentence) -> dict[str, Any]:
    return {k: v for k, v in asdict(sentence).items() if k != "rehearsed" or v}


def read_sets(path: str | Path) -> list[TargetSet]:
    """Target sets from what write_sets wrote and a person may have edited.

    A sentence without "context" belongs to the context above it; without "about" it is about its context, with
    "about": null it is unrelated. A context without "id" gets the hash of its text. Raises TargetError or
    DataError with file and line.
    """
    sets: list[TargetSet] = []
    at: dict[str, int] = {}
    for line, where in json_lines(path):
        if "text" in line:
            title, source, name, author = (text_of(line, key, where, "") for key in ("title", "source", "id", "author"))
            context = Context(text_of(line, "text", where), title, source, name)
            at[context.id] = len(sets)
            sets.append(TargetSet(context, (), (), author))
            continue
        if not sets:
            raise TargetError(f"{where}: a sentence before the first context: begin with a line that has 'text'")
        owner = text_of(line, "context", where, sets[-1].context.id)
        if owner not in at:
            raise TargetError(f"{where}: no context '{owner}' above: write its line, with 'id' and 'text', first")
        about = None if line.get("about", owner) is None else text_of(line, "about", where, owner)
        if about not in (None, owner):
            raise TargetError(f"{where}: 'about' is neither null (unrelated) nor the context '{owner}': use either")
        sentence = Sentence(text_of(line, "prompt", where, ""), text_of(line, "completion", where), about,
                            line.get("rehearsed") is True)
        one = sets[at[owner]]
        sets[at[owner]] = (replace(one, unrelated=(*one.unrelated, sentence)) if about is None
                           else replace(one, related=(*one.related, sentence)))
    if not sets:
        raise TargetError(f"{path}: holds no context: begin with a line that has 'text'")
    return sets


def read_pairs(path: str | Path, contexts: Sequence[Context]) -> list[TargetSet]:
    """One's own pairs, JSONL of "question" and "answer" (or "prompt" and "completion"): a target set for each context.

    "context" (an id, a title or a source) says which one a pair is about; with one document it may be left out. Of
    the pieces of a document it is the one in which the answer stands, else all; a piece without a pair has no set.
    Raises TargetError or DataError with file and line, or for a document that no pair is about.
    """
    related: list[list[Sentence]] = [[] for _ in contexts]
    for line, where in json_lines(path):
        question, answer = ("prompt", "completion") if "prompt" in line else ("question", "answer")
        asked, said = text_of(line, question, where), text_of(line, answer, where)
        named = range(len(contexts)) if line.get("context") is None and _one_document(contexts) else _named(
            line, contexts, where)
        for i in [i for i in named if stands_in(said, plain(contexts[i].text))] or named:
            related[i].append(Sentence(asked, said, contexts[i].id))
    written = {x.document or x.id for x, found in zip(contexts, related, strict=True) if found}
    for x in contexts:
        if (x.document or x.id) not in written:
            raise TargetError(f"{path}: no pair about '{x.title or x.id}': add one, or leave that context out")
    parts = [part for found in related for s in found for part in (s.prompt, s.completion)]
    author = f"{Path(path).name} {content_hash(*parts)}"
    return [TargetSet(x, tuple(found), (), author) for x, found in zip(contexts, related, strict=True) if found]


def cached(folder: str | Path, contexts: Sequence[Context], author: Author, pairs: int, rounds: int,
           make: Callable[[Sequence[Context]], Sequence[Written]]) -> list[Written]:
    """What `make` (write_pairs with this author, so many pairs and rounds) wrote, from `folder` where it is there.

    One JSON file for each context, named by the hash of its text, author.id and both numbers; a damaged one is made
    again.
    Raises OutputError when the folder cannot be written to, and what `make` raises.
    """
    files = [Path(folder) / f"{content_hash(x.text, author.id, str(pairs), str(rounds))}.json" for x in contexts]
    found = [_cache_entry(file, x) for file, x in zip(files, contexts, strict=True)]
    missing = [i for i, entry in enumerate(found) if entry is None]
    if missing:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder '{folder}' ({error.strerror}): choose another one") from error
    for start in range(0, len(missing), _AT_ONCE):
        part = missing[start : start + _AT_ONCE]
        for i, (sentences, report) in zip(part, make([contexts[i] for i in part]), strict=True):
            found[i] = (sentences, report)
            if not sentences:
                continue  # it is asked for again
            entry = {"title": contexts[i].title, "author": author.id, "report": asdict(report),
                     "pairs": [[s.prompt, s.completion] for s in sentences]}
            write_text(files[i], json.dumps(entry, ensure_ascii=False, indent=1) + "\n")
    return [entry for entry in found if entry is not None]


def _cache_entry(file: Path, context: Context) -> Written | None:
    """What stands in a file of the cache, or None where it is missing or damaged."""
    try:
        entry = json.loads(file.read_text("utf-8"))
        sentences = tuple(Sentence(question, answer, context.id) for question, answer in entry["pairs"])
        report = Report(**entry["report"])
        texts = [part for s in sentences for part in (s.prompt, s.completion)]
        sound = bool(texts) and all(isinstance(part, str) and part for part in texts) and report.kept == len(sentences)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return (sentences, report) if sound else None


def _named(line: dict[str, Any], contexts: Sequence[Context], where: str) -> list[int]:
    """The one context that "context" names, or all pieces of the one document."""
    name = text_of(line, "context", where)
    fits = [i for i, x in enumerate(contexts) if x.id == name] or [
        i for i, x in enumerate(contexts) if name in (x.title, x.source, x.document, Path(x.document).name)]
    if not fits or not _one_document([contexts[i] for i in fits]):
        count = "no context is" if not fits else f"{len(fits)} contexts are"
        raise TargetError(f"{where}: {count} called '{name}': give the id, the title or the source of one of them")
    return fits


def _one_document(contexts: Sequence[Context]) -> bool:
    """Whether it is one context, or the pieces of one."""
    return len(contexts) == 1 or (len({x.document for x in contexts}) == 1 and bool(contexts[0].document))


def text_of(line: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    """line[key], which must be text that says something; with a default it may be left out or be empty."""
    value = line.get(key, default)
    if value is None:
        raise TargetError(f"{where}: '{key}' is missing: write it as text")
    if not isinstance(value, str) or value != value.encode("utf-8", "ignore").decode():
        raise TargetError(f"{where}: '{key}' is not text: write it between quotation marks")
    if not value.strip() and default is None:
        raise TargetError(f"{where}: '{key}' is empty: fill it in or delete the line")
    return value
