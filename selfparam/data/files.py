"""JSON and JSONL files of data sets: read, gzipped or not, with errors that say where; written whole or not at all.

Refuses to know what the objects mean. Source: none, reading only.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from selfparam.errors import DataError, OutputError


def read_text(path: str | Path) -> str:
    """The text of a file (UTF-8, gzip by its content). Raises DataError."""
    try:
        raw = Path(path).read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path} line {bad}: is not UTF-8 text: save the file as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"'{path}' is a damaged gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"cannot read '{path}' ({error.strerror or error}): check the path") from error


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises DataError."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not JSON ({error}): give a JSON file") from error


def json_lines(path: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a JSONL file and where they stand ("test.jsonl line 3"). Raises DataError, also for none."""
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: is empty: write one JSON object on each line")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not JSON ({error}): write one JSON object on each line") from error
        if not isinstance(found, dict):
            raise DataError(f"{where}: is not a JSON object: write one object on each line, not a list")
        yield found, where


def write_json_lines(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line. Raises OutputError."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: str | Path, text: str) -> None:
    """Write a file beside its place and rename it. Raises OutputError."""
    place = Path(path)
    beside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        try:
            beside.write_text(text, encoding="utf-8", newline="\n")
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write '{path}' ({error.strerror}): free space or choose another file") from error
