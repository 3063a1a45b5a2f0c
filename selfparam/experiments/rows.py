"""Rows of results: JSONL, one line a cell, appended as cells finish; a torn last line is forgotten.

Refuses to know how rows are made and shown. Source: none, ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from selfparam.errors import OutputError, TableError

Row = dict[str, Any]


def read_rows(path: Path) -> dict[str, Row]:
    """The last row of each cell by its id; empty where there is no file. Raises TableError for a damaged line."""
    if not path.exists():
        return {}
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"cannot read the rows in '{path}': move the file away, or correct it") from error
    found: dict[str, Row] = {}
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], 1):  # behind the last line break: nothing, or a torn line
        if line.strip():
            try:
                row = json.loads(line)
                found[row["cell"]] = row
            except (ValueError, TypeError, KeyError) as error:
                raise TableError(f"{path}:{number}: no row of results: delete the line, its cell runs again") from error
    return found


def append_row(path: Path, row: Row) -> None:
    """One line at the end, on disk when this returns; a torn line before it is cut off. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write to '{path}' ({error.strerror}): make room, or check permissions") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All rows in the order given, whole or not at all. Raises OutputError."""
    part = path.with_suffix(".part")
    try:
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"cannot write to '{path}' ({error.strerror}): make room, or check permissions") from error


def usable(row: Row | None, model_hash: str, data_hash: str) -> bool:
    """Whether a row is a result of these weights and this data, and no error."""
    return row is not None and "error" not in row and (row["model_hash"], row["data_hash"]) == (model_hash, data_hash)
