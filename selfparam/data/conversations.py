"""Conversations about films: INSPIRED and REDIAL, and any files of the same formats.

A conversation is a Context whose text is lines of "User: …" and "System: …". A Request is a system turn of a test
conversation that recommends something: what was said before, and the names to hit. Files are those of He et al. (rows
of context, resp, rec, prev_entity; entity2id.json; item_ids.json) or dialogues (turns of role and text), gzipped or
not; without a file, the full training sets come from the hub. Refuses to know models, target sets and scores.
Source: SELF-PARAM, arXiv 2410.00487, 4.4; He et al., arXiv 2308.10053; github.com/AaronHeee/LLMs-as-Zero-Shot-
Conversational-RecSys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from selfparam.data.files import json_lines, read_json, write_json_lines
from selfparam.errors import DataError
from selfparam.types import Context

Role = Literal["User", "System"]
SetName = Literal["inspired", "redial"]

_ROLES: dict[str, Role] = {"seeker": "User", "user": "User", "recommender": "System", "system": "System"}


@dataclass(frozen=True)
class Source:
    """Where a set comes from. conversations: how many the paper injects; first: who speaks the first entry of a row's
    `context` (which is mostly empty), the rest alternating."""

    hub: str
    conversations: int
    first: Role


#: 731 is the number of INSPIRED training conversations in which the system recommends something; of REDIAL the paper
#: injects 1,000 of 7,415 and does not say which: the first ones.
SOURCES: dict[SetName, Source] = {
    "inspired": Source("ZhankuiHe/inspired_cikm", 731, "User"),
    "redial": Source("ZhankuiHe/redial_cikm", 1000, "System"),
}


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True)
class Request:
    """A system turn to be filled. input: the earlier lines and "System: "; targets and seen: ids of entities.

    about: id of the conversation that alone tells the answer, where there is one (the fictional world).
    """

    input: str
    targets: tuple[int, ...]
    seen: tuple[int, ...]
    about: str = ""


# --- conversation <-> context ----------------------------------------------------------------------------------------


def conversation(turns: Iterable[Turn], title: str = "", source: str = "") -> Context:
    """A Context of lines "Role: text": turns of one role in a row are joined, empty ones left out."""
    said = [Turn(t.role, " ".join(t.text.split())) for t in turns if t.text.strip()]
    lines = [f"{role}: {' '.join(t.text for t in part)}" for role, part in groupby(said, key=lambda t: t.role)]
    return Context("\n".join(lines), title, source)


def turns_of(context: Context) -> list[Turn]:
    """The turns of a conversation. Raises DataError for a Context that is no conversation."""
    found: list[Turn] = []
    for line in context.text.split("\n"):
        role, colon, text = line.partition(": ")
        if not colon or role not in ("User", "System"):
            raise DataError(f"'{context.title or context.id}' is no conversation: every line must begin with "
                            f"'User: ' or 'System: ', not '{line[:40]}'")
        found.append(Turn("User" if role == "User" else "System", text))
    return found


def input_of(turns: Sequence[Turn]) -> str:
    """What a system turn answers, as the prompt takes it: a line for each turn, then "System: "."""
    return "\n" + "".join(f"{t.role}: {t.text}\n" for t in turns) + "System: "


# --- conversations for injection -------------------------------------------------------------------------------------


def conversations(name: SetName, path: str | Path | None = None, limit: int | None = None) -> list[Context]:
    """Conversations to inject, in the order of the file: `limit` of them, by default as many as in the paper.

    path: rows or dialogues; None fetches the training set of SOURCES from the hub. A file with fewer conversations
    gives all it has. Raises DataError.
    """
    source = SOURCES[name]
    file = Path(path) if path else from_hub(name, "train.jsonl")
    return read_conversations(file, limit=source.conversations if limit is None else limit, first=source.first)


def read_conversations(path: str | Path, *, limit: int | None = None, first: Role = "User") -> list[Context]:
    """The first `limit` conversations of a file: dialogues ("turns") or rows ("context", "resp", "dialog_id").

    The rows of one dialogue are one conversation: that of its longest row. Raises DataError with file and line.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{limit} conversations cannot be read: give a limit of at least 1")
    said: dict[str, list[Turn]] = {}
    for row, where in json_lines(path):
        name = where if row.get("dialog_id") is None else str(row["dialog_id"])
        turns = _turns_of_dialogue(row, where) if "turns" in row else _turns_of_row(row, where, first)
        if name not in said and limit is not None and len(said) == limit:
            continue  # rows of the conversations taken may still come
        if len(turns) > len(said.get(name, ())):
            said[name] = turns
    found = [conversation(turns, title, Path(path).name) for title, turns in said.items()]
    found = [x for x in found if x.text]
    if not found:
        raise DataError(f"{path}: holds no conversation: give rows with 'context' and 'resp', or dialogues of 'turns'")
    return found


def _turns_of_dialogue(row: dict[str, Any], where: str) -> list[Turn]:
    found: list[Turn] = []
    for turn in _list(row, "turns", where):
        role = _ROLES.get(str(turn.get("role", "")).lower()) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("text"), str):
            raise DataError(f"{where}: a turn needs 'text' and a 'role' (seeker or recommender): {str(turn)[:60]}")
        found.append(Turn(role, turn["text"].replace("QUOTATION_MARK", '"')))  # how INSPIRED's TSV writes them
    return found


def _turns_of_row(row: dict[str, Any], where: str, first: Role) -> list[Turn]:
    texts = [str(text or "") for text in _list(row, "context", where)]
    second: Role = "System" if first == "User" else "User"
    turns = [Turn(first if i % 2 == 0 else second, text) for i, text in enumerate(texts)]
    return [*turns, Turn("User" if row.get("is_user") else "System", str(row.get("resp") or ""))]


# --- the test --------------------------------------------------------------------------------------------------------


def read_requests(path: str | Path, entities: dict[int, str], limit: int | None = None) -> list[Request]:
    """The first `limit` rows of a test.jsonl. Raises DataError for a row without input or with an unknown id."""
    found: list[Request] = []
    for row, where in json_lines(path):
        if limit is not None and len(found) == limit:
            break
        if not isinstance(row.get("input"), str):
            raise DataError(f"{where}: 'input' is missing: write the conversation up to the turn into it")
        ids = {key: tuple(_list(row, key, where)) for key in ("rec", "prev_entity")}
        unknown = [i for key in ids for i in ids[key] if not isinstance(i, int) or i not in entities]
        if unknown:
            raise DataError(f"{where}: no entity has the id {unknown[0]}: give the entity2id.json of this test")
        if not ids["rec"]:
            raise DataError(f"{where}: 'rec' is empty: give at least one target")
        found.append(Request(row["input"], ids["rec"], ids["prev_entity"]))
    if not found:
        raise DataError(f"{path}: holds no rows: give a test.jsonl")
    return found


def read_entities(path: str | Path) -> dict[int, str]:
    """entity2id.json as {id: key}; metrics.recall.entity_name makes a name of a key (a URL). Raises DataError."""
    found = read_json(path)
    if not isinstance(found, dict) or not found or not all(isinstance(i, int) for i in found.values()):
        raise DataError(f"'{path}' is no list of entities: give a JSON object of name -> id")
    return {i: key for key, i in found.items()}


def read_items(path: str | Path) -> frozenset[int]:
    """item_ids.json: the ids that are films. Raises DataError."""
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(i, int) for i in found):
        raise DataError(f"'{path}' is no list of ids: give a JSON list of numbers")
    return frozenset(found)


# --- what was recommended --------------------------------------------------------------------------------------------


def read_outputs(path: str | Path, rows: int) -> tuple[dict[int, str], list[str]]:
    """Generated texts by row, JSONL of {"index", "text"}, and a notice for each kind of thing that was left out.

    Rows count from 0. Of several outputs for one row the first counts. Raises DataError where none is usable.
    """
    found: dict[int, str] = {}
    doubled: list[int] = []
    unknown: list[Any] = []
    without: list[Any] = []
    for line, where in json_lines(path):
        index, text = line.get("index"), line.get("text")
        if isinstance(index, bool) or not isinstance(index, int):
            without.append(where.removeprefix(f"{path} "))
        elif not 0 <= index < rows:
            unknown.append(index)
        elif not isinstance(text, str):
            without.append(index)
        elif index in found:
            doubled.append(index)
        else:
            found[index] = text
    missing = [i for i in range(rows) if i not in found]
    if not found:
        raise DataError(f"{path}: holds no output for any of the {rows} rows: write lines of "
                        '{"index": row, "text": generated text}')
    name = Path(path).name
    notices = [
        (missing, f"{name}: {len(missing)} of {rows} rows have no output ({_some(missing)}): left out of all means"),
        (doubled, f"{name}: {len(doubled)} outputs are for rows that have one already ({_some(doubled)}): "
                  "the first one counts"),
        (unknown, f"{name}: {len(unknown)} outputs have an index that is no row of the test ({_some(unknown)}): "
                  "left out"),
        (without, f"{name}: {len(without)} lines have no 'index' or no 'text' ({_some(without)}): left out"),
    ]
    return found, [notice for those, notice in notices if those]


def write_outputs(path: str | Path, texts: Sequence[str]) -> None:
    """Generated texts, one for each row of the test, as read_outputs reads them. Raises OutputError."""
    write_json_lines(path, [{"index": i, "text": text} for i, text in enumerate(texts)])


def _some(those: Sequence[Any], most: int = 5) -> str:
    return ", ".join(str(one) for one in those[:most]) + (", …" if len(those) > most else "")


# --- the hub ---------------------------------------------------------------------------------------------------------


def from_hub(name: SetName, file: str) -> Path:
    """A file of the set (train.jsonl, test.jsonl, entity2id.json, item_ids.json), fetched once and kept in the cache.

    Needs the network unless it is in the cache. Raises DataError.
    """
    from huggingface_hub import hf_hub_download

    source = SOURCES[name]
    try:
        return Path(hf_hub_download(source.hub, file, repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"cannot fetch {file} of {source.hub} from the hub ({reason}): give a local file") from error


def _list(row: dict[str, Any], key: str, where: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise DataError(f"{where}: '{key}' is no list: write one into it")
    return value
