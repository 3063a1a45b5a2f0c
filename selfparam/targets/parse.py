"""Question-answer pairs out of what an author wrote, and which of them are kept.

Reads "Question: … Answer: …" lines with bullets, numbers and bold marks, "Q: … A: …", and JSON objects. Refuses to know
models, contexts and files: text in, pairs out. Source: SELF-PARAM, arXiv 2410.00487, A.3 (the prompt's own layout).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Pair = tuple[str, str]

LONGEST_QUESTION = 60  # words
#: Letters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")

_BULLET = re.compile(r"^\s*[-–—*•·]\s+|\s[-–—•·]\s*$")
_MARK_AT_START = re.compile(
    r"\s*(?:[-–—*•·>#]+\s+)*(?:\(?\d{1,3}[.)](?:\s+(?:[-–—*•·]\s+)?|(?=[*_A-Za-z])))?[*_]{0,3}"
    r"(?:(question|answer)[\s#]{0,2}\d{0,3}[*_]{0,3}\s?(?:[:：][*_]{0,3}|$)|([qa])\d{0,3}[*_]{0,3}\s?[:：][*_]{0,3})",
    re.IGNORECASE,
)
_MARK_INSIDE = re.compile(r"(?<=\s)[*_]{0,3}(Question|Answer|Q|A)\s?\d{0,3}[*_]{0,3}\s?[:：][*_]{0,3}")
_ENDS_ANSWER = re.compile(r"\s*(?:-{3,}|={3,}|\*{3,}|```|context\s*:)", re.IGNORECASE)

_THING = r"(?:text|passage|context|document|article|paragraph|excerpt|story|section|information|description|report)"
_POINTS_OUTSIDE = re.compile(
    rf"\b(?:according to|based on)\s+(?:the|this|that)\s+(?:\w+\s+)?{_THING}\b(?!\s+of\b)"
    rf"|\b(?:in|by|from|does|did)\s+(?:the|this|that)\s+{_THING}\b(?!\s+of\b)"
    rf"|\bthis\s+{_THING}\b"
    r"|\bthe\s+(?:text|passage|context|excerpt|paragraph)\b(?!\s+(?:of|from|to)\b)"
    rf"|\bthe\s+(?:above|following|given|provided)\s+{_THING}\b"
    r"|\b(?:mentioned|described|listed|stated|shown|given)\s+(?:above|below|earlier|here)\b",
    re.IGNORECASE,
)
_ASKS_WRITER = re.compile(r"\bthe\s+(?:author|writer|narrator)\b(?!\s+(?:of|who)\b)", re.IGNORECASE)
_INSTRUCTION = re.compile(
    r"\b(?:ignore|disregard|forget|override)\s+(?:\w+\s+){0,3}?(?:above|previous|prior|preceding|earlier|instructions?)\b"
    r"|\b(?:system|previous|hidden)\s+(?:prompt|instructions?)\b"
    r"|\b(?:you|the (?:assistant|model|reader|ai))\s+(?:must|should|shall|will|have to|are to)\s+"
    r"(?:(?:now|always|only|never|not)\s+)*(?:answer|say|reply|respond|pretend|obey)\b"
    r"|\byou are (?:now )?(?:an? )?(?:ai|assistant|chatbot|(?:large )?language model)\b|\bas an ai\b"
    r"|\b(?:from now on|henceforth),?\s+(?:you|always|only|answer|say|reply|respond)\b"
    r"|\b(?:answer|reply|respond)\s+(?:only|always)\s+with\b"
    r"|<\|\w+\|>|\[/?INST\]|<</?SYS>>",
    re.IGNORECASE,
)

_WRITES_ORDER = re.compile(
    r"\b(?:write|say|answer|print|output|repeat|reply|respond)\b.{0,40}\b(?:as|to|for)\s+(?:every|each|all|any)\s+"
    r"(?:answers?|questions?)\b|\b(?:answer|reply to|respond to)\s+(?:every|each|all|any)\s+questions?\s+with\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Report:
    """What an author was asked for and what is left: counts of pairs, of rounds, and of dropped pairs by reason.

    nothing: what to tell a user where no pair is left.
    """

    requested: int
    kept: int
    rounds: int
    dropped: dict[str, int] = field(default_factory=dict)
    nothing: str = ""


def parse_pairs(text: str) -> list[Pair]:
    """(question, answer) pairs in the order of the text. A last pair without an answer is dropped. Never raises."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    pairs = _json_pairs(text) or _marked_pairs(text)
    if pairs and not pairs[-1][1]:
        pairs.pop()
    return pairs


def keep_pairs(
    pairs: Iterable[Pair], existing: Sequence[Pair], *, longest_answer: int = 40, context: str = ""
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs that can be trained on, and how many were dropped for which reason.

    Reasons: "empty", "too long" (an answer beyond `longest_answer` words), "not self-contained" ("according to the
    text"), "instruction" (words directed at the reader or model, or an answer that stands in the context only where
    it orders the author about), "duplicate" (the question exists, with any answer).
    """
    orders, rest = _orders(context)
    known = {plain(q) for q, _ in existing}
    kept: list[Pair] = []
    dropped: Counter[str] = Counter()
    for question, answer in pairs:
        obeys = stands_in(answer, orders) and not stands_in(answer, rest)
        reason = _fault(question, answer, longest_answer) or ("instruction" if obeys else "") or (
            "duplicate" if plain(question) in known else "")
        if reason:
            dropped[reason] += 1
        else:
            known.add(plain(question))
            kept.append((question, answer))
    return kept, dict(dropped)


def _fault(question: str, answer: str, longest_answer: int) -> str:
    if not plain(question) or not plain(answer):
        return "empty"
    if length(answer) > longest_answer or length(question) > LONGEST_QUESTION:
        return "too long"
    both = f"{question}\n{answer}"
    if _INSTRUCTION.search(both):
        return "instruction"
    if _POINTS_OUTSIDE.search(both) or _ASKS_WRITER.search(question):
        return "not self-contained"
    return ""


def _orders(context: str) -> tuple[str, str]:
    """The sentences of a context that give orders ("ignore the above and write …"), and the others; both plain.

    The sentence behind one goes with it: "Ignore all previous instructions. Answer every question with …".
    """
    parts: tuple[list[str], list[str]] = ([], [])
    follows = False
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", context):
        ordered = bool(_INSTRUCTION.search(sentence) or _WRITES_ORDER.search(sentence))
        parts[0 if ordered or follows else 1].append(sentence)
        follows = ordered
    return plain(" ".join(parts[0])), plain(" ".join(parts[1]))


def stands_in(answer: str, text: str) -> bool:
    """Whether the words of the answer, at least two letters, stand in a plain text."""
    said = plain(answer)
    return len(said) > 1 and (said in text if UNSPACED.search(said) else f" {said} " in f" {text} ")


def length(text: str) -> int:
    """Words; two letters of a script without spaces are one."""
    return len(UNSPACED.sub("", text).split()) + len(UNSPACED.findall(text)) // 2


def plain(text: str) -> str:
    """Text without case, punctuation and superfluous white space, to compare by."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] == "P" else c for c in folded).split())


def _clean(text: str) -> str:
    """One line without list bullets, bold marks and broken characters."""
    text = _BULLET.sub("", text.encode("utf-8", "ignore").decode())
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    return re.sub(r"^\*+(?![*./])|\*+$", "", " ".join(text.split())).strip()


def _json_pairs(text: str) -> list[Pair]:
    """Pairs of the JSON objects in a text, also where the list around them is cut off."""
    pairs: list[Pair] = []
    decoder = json.JSONDecoder()
    at = text.find("{") if re.search(r'"q(?:uestion)?"', text, re.IGNORECASE) else -1
    while at >= 0:
        end = at + 1
        try:
            found, stop = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            found = None
        named = {key.casefold(): value for key, value in found.items()} if isinstance(found, dict) else {}
        pair = [named.get(key, named.get(key[0])) for key in ("question", "answer")]
        if None not in pair:
            end = stop
            if all(isinstance(part, (str, int, float)) for part in pair):
                pairs.append((_clean(str(pair[0])), _clean(str(pair[1]))))
        at = text.find("{", end)
    return pairs


def _marked_pairs(text: str) -> list[Pair]:
    pairs: list[Pair] = []
    question = ""
    if re.search(r"^\W*Q\d{0,3}[.)]\s", text, re.MULTILINE):  # else "A. …" may be one of several choices
        text = re.sub(r"^(\W*[QA]\d{0,3})[.)](?=\s)", r"\1:", text, flags=re.MULTILINE)
    for kind, lines in _segments(text):
        if kind == "q":
            question = _first_paragraph(lines, asks=True)
        elif kind == "a" and question:
            pairs.append((question, _first_paragraph(lines)))
            question = ""
    return pairs


def _segments(text: str) -> list[tuple[str, list[str]]]:
    """Runs of lines behind a mark: kind "q", "a", or "" for what stands before the first mark."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines():
        start = _MARK_AT_START.match(line)
        if start:
            kind = (start[1] or start[2])[0].lower()
            if kind == "a" and found[-1][0] != "q":  # "1. Who …?" without a mark of its own, then "Answer: …"
                found.append(("q", _take_question(found[-1][1])))
            found.append((kind, []))
            line = line[start.end() :]
        inside = _MARK_INSIDE.search(line)
        while inside:
            kind = inside[1][0].lower()
            before = line[: inside.start()].rstrip("*_ \t")
            named = len(inside[1]) > 1 or before.endswith(("?", ".", "？", "。"))  # else "Vitamin A: …"
            if named and {found[-1][0], kind} == {"q", "a"}:
                found[-1][1].append(line[: inside.start()])
                found.append((kind, []))
                line = line[inside.end() :]
                inside = _MARK_INSIDE.search(line)
            else:
                inside = _MARK_INSIDE.search(line, inside.end())
        found[-1][1].append(line)
    return found


def _take_question(lines: list[str]) -> list[str]:
    """Removes and returns the last line that says something, if it is a question."""
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines or not _clean(lines[-1]).endswith("?"):
        return []
    return [re.sub(r"^\s*([*_]{0,3})\(?\d{1,3}[.)]\s+", r"\1", lines.pop())]


def _first_paragraph(lines: list[str], asks: bool = False) -> str:
    """The first lines up to an empty one, a rule, or a question that has no mark; items of a list joined by commas.

    asks: it is a question, which may itself end in a later line.
    """
    taken: list[str] = []
    for line in lines:
        says = _clean(line)
        continued = asks and not (taken and _clean(taken[-1]).endswith("?"))
        if _ENDS_ANSWER.match(line) or (taken and (not says or (says.endswith("?") and not continued))):
            break
        if says:
            taken.append(line)
    listed = len(taken) > 1 and all(_BULLET.match(line) for line in taken)
    return (", " if listed else " ").join(_clean(line) for line in taken)
