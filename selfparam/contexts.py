"""Files, folders, standard input and JSONL become Contexts; long Contexts become pieces counted in tokens.

Every file is read whole or refused with a ContextError; whatever a folder leaves out is told in `notices`. Word files
give their body (text, tables, text boxes), not headers, footers or notes. Refuses to know models and tokenizers:
`split_context` is given a function that counts.
Source: SELF-PARAM, arXiv 2410.00487, section 3 (x).
"""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import re
import sys
import zipfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from selfparam.errors import ContextError
from selfparam.types import Context

KINDS = (".txt", ".md", ".html", ".htm", ".pdf", ".docx", ".jsonl")
STANDARD_INPUT = "standard input"
_TITLE_LENGTH = 200  # characters kept of a title
_BEGINNING = 1000  # characters of a text in which its title is looked for
_FIRST_LINE_LENGTH = 80  # characters that the first line of a .txt may have to be its title
_DOCX_EXPANSION, _DOCX_MEMBERS = 20, 10_000
_DEEPEST, _MOST_FILES = 32, 100_000  # folders inside folders, and files, that are read

#: HTML: what is no text of the page, what stands in lines of its own, what in paragraphs of its own.
_SKIPPED = {"script", "style", "nav", "template", "svg"}
_LINES = {"br", "li", "dt", "dd", "tr", "option", "button"}
_PARAGRAPHS = {
    "address", "article", "aside", "blockquote", "body", "caption", "details", "div", "dl", "fieldset", "figcaption",
    "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "hr", "main", "noscript", "ol",
    "p", "pre", "section", "summary", "table", "ul",
}
_FRONT_MATTER = re.compile(r"\A---\n.*?\n(?:---|\.\.\.)\n", re.S)
_FENCED_CODE = re.compile(r"^ {0,3}(`{3,}|~{3,}).*?(?:^ {0,3}\1|\Z)", re.M | re.S)
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(\S.*)$|^([^\s|>*+-].*)\n(?:=+|-{3,})[ \t]*$", re.M)
_SURROGATE = re.compile("[\ud800-\udfff]")
_WORD_XML = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_FORMULA = "{http://schemas.openxmlformats.org/officeDocument/2006/math}t"
#: The letters of Word's font "Symbol", which stand 0xF000 higher there.
_SYMBOLS = str.maketrans("ABCDEFGHIKLMNOPQRSTUWXYZabcdefghiklmnopqrstuwxyz",
                         "ΑΒΧΔΕΦΓΗΙΚΛΜΝΟΠΘΡΣΤΥΩΞΨΖαβχδεφγηικλμνοπθρστυωξψζ")
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"  # a second copy for old programs
_WHITE = {_WORD_XML + tag: white for tag, white in
          {"tab": "\t", "br": "\n", "cr": "\n", "p": "\n", "noBreakHyphen": "-"}.items()}

_WORDS = re.compile(r"\s+")
#: Where a piece may end, best first; every match ends where the next piece begins.
_BORDERS = (
    re.compile(r"\n\s*\n\s*|\n(?=(?:User|Assistant|System): )"),  # paragraphs, turns of a conversation
    re.compile(r"[.!?…][\"'”’)\]»」』]*\s+|[。！？]+[”’）」』]*\s*"),  # sentences; some scripts have no spaces behind
    re.compile(r"\n\s*"),
    re.compile(r"[，；、：]\s*"),
    _WORDS,
)
_LEAST = 1 / 3  # of what fits: a better border that leaves less is none


# --- files -> contexts ----------------------------------------------------------------------------------------------


def read_contexts(paths: Sequence[str | Path], *, field: str = "text", stdin: BinaryIO | None = None,
                  max_bytes: int = 20_000_000, notices: list[str] | None = None) -> list[Context]:
    """The contexts of files (.txt .md .html .htm .pdf .docx .jsonl), of folders, and of "-": standard input as text.

    Folders are read recursively and sorted, without hidden files. A .jsonl holds one object a line: its text in `field`
    and perhaps a "title", or a conversation in "messages". Such a title, and that of a page, is put in front of a text
    that does not begin with it. Contexts with the same text are kept once. max_bytes: bytes of one file. notices: takes
    a line for whatever was skipped.
    Raises ContextError, one line, for the first file that cannot be read whole.
    """
    told = [] if notices is None else notices
    if isinstance(paths, (str, Path)):  # a lone path is no sequence of one-letter paths
        paths = [paths]
    kept: dict[str, Context] = {}
    read = 0
    for path in paths:
        for context in _read_path(path, field, stdin, max_bytes, told):
            read += 1
            kept.setdefault(context.id, context)
    if not read:
        raise ContextError("nothing to read: name a file, a folder, or - for standard input")
    if read > len(kept):
        told.append(f"left out {read - len(kept)} context(s) with the same text as another")
    return list(kept.values())


def from_file(path: str | Path) -> Context:
    """The one context of a file. Raises ContextError when it cannot be read or gives several."""
    contexts = read_contexts([path])
    if len(contexts) > 1:
        raise ContextError(f"{_plain(path)}: gives {len(contexts)} contexts where one is wanted: use read_contexts")
    return contexts[0]


def _read_path(
    path: str | Path, field: str, stdin: BinaryIO | None, max_bytes: int, notices: list[str]
) -> Iterator[Context]:
    if str(path) == "-":
        text = _decode(_read_bytes(stdin or sys.stdin.buffer, STANDARD_INPUT, max_bytes), STANDARD_INPUT)
        yield _context(text, _text_title(text), STANDARD_INPUT)
        return
    for file in _files(Path(path), notices) if os.path.isdir(path) else [Path(path)]:
        yield from _read_file(file, field, max_bytes, notices)


def _files(folder: Path, notices: list[str]) -> list[Path]:
    """Files of the supported kinds in the folder, sorted; notices tell what is left out."""

    def fail(error: OSError) -> NoReturn:
        where = _plain(error.filename)
        raise ContextError(f"{where}: cannot be read ({error.strerror}): check its permissions") from error

    home = os.path.realpath(folder)
    files: list[Path] = []
    others: list[str] = []
    outside = deep = 0
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if len(Path(where).parts) - len(Path(folder).parts) >= _DEEPEST:
            deep += len(folders)
            folders.clear()
        if len(files) + len(others) > _MOST_FILES:
            raise ContextError(f"{_plain(folder)}: more than {_MOST_FILES} files: name a smaller folder")
        for path in (Path(where, name) for name in folders + names):
            if path.name.startswith((".", "~$")):  # "~$" are the lock files of Word
                continue
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                outside += 1
            elif path.name in folders:
                continue
            elif path.suffix.lower() in KINDS:
                files.append(path)
            else:
                others.append(path.suffix or path.name)
    if not files:
        raise ContextError(f"{_plain(folder)}: no file to read in this folder: put {' '.join(KINDS)} files into it")
    if others:
        kinds = ", ".join(sorted({_plain(other) for other in others})[:8])
        notices.append(f"{_plain(folder)}: skipped {len(others)} file(s) of other kinds ({kinds})")
    if deep:
        notices.append(f"{_plain(folder)}: skipped {deep} folder(s) more than {_DEEPEST} folders down")
    if outside:
        notices.append(f"{_plain(folder)}: skipped {outside} link(s) that leave the folder")
    return sorted(files)


def _read_file(path: Path, field: str, max_bytes: int, notices: list[str]) -> list[Context]:
    name, kind = _plain(path), path.suffix.lower()
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise ContextError(f"{name}: not a regular file: copy it into one, or pipe it to -")
        if kind not in KINDS:
            raise ContextError(f"{name}: the kind '{_plain(kind)}' is not read: convert it to one of {' '.join(KINDS)}")
    data = _read_bytes(path, name, max_bytes)
    if not data:
        raise ContextError(f"{name}: the file is empty: remove it or put text into it")
    if kind == ".pdf":
        return [_context(_pdf_text(data, name, max_bytes, notices), "", name)]
    if kind == ".docx":
        return [_context(_docx_text(data, name, max_bytes), "", name)]
    text = _decode(data, name)
    if kind == ".jsonl":
        return _jsonl(text, name, field)
    if kind in (".html", ".htm"):
        return [_context(*_titled(*_html(text, name)), name)]
    return [_context(text, _heading(text) if kind == ".md" else _text_title(text), name)]


def _read_bytes(source: Path | BinaryIO, name: str, max_bytes: int) -> bytes:
    try:
        if isinstance(source, Path):
            with source.open("rb") as stream:
                data = stream.read(max_bytes + 1)
        else:
            data = source.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, a closed stream
        reason = error.strerror if isinstance(error, OSError) else error
        raise ContextError(f"{name}: cannot be read ({reason}): check the path and its permissions") from error
    if len(data) > max_bytes:
        raise ContextError(f"{name}: larger than {max_bytes} bytes: split it into smaller files")
    return data


def _decode(data: bytes, name: str) -> str:
    """Text from UTF-8, with or without a byte order mark, or from UTF-16 with one; every line ends with a newline."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    if "\0" in data.decode(encoding, "replace"):
        raise ContextError(f"{name}: holds NUL bytes, so it is binary and not text: save it as UTF-8 text")
    try:
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ContextError(f"{name}: not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _context(text: str, title: str, source: str) -> Context:
    text = text.strip()
    if not text:
        raise ContextError(f"{source}: empty, there is no text in it: remove it or put text into it")
    if "\0" in text or _SURROGATE.search(text + title):
        raise ContextError(f"{source}: holds NUL characters or halves of surrogate pairs: write it again as UTF-8 text")
    return Context(text, _title(title), source)


def _title(title: str) -> str:
    return " ".join(title.split())[:_TITLE_LENGTH].rstrip()


def _plain(path: str | Path) -> str:
    """A path or other foreign text as printable text of one line."""
    return "".join(char if char.isprintable() else "?" for char in str(path))


def _reason(error: Exception) -> str:
    return _plain(next(iter(str(error).splitlines()), ""))[:200] or type(error).__name__


# --- the kinds of files ---------------------------------------------------------------------------------------------


def _titled(text: str, title: str) -> tuple[str, str]:
    """Text and title of a context whose title stands apart: in front of the text, unless its beginning has it."""
    title = _title(title)
    beginning = " ".join(text[:_BEGINNING].split())
    return (text if not text.strip() or title.casefold() in beginning.casefold() else f"{title}\n\n{text}"), title


def _text_title(text: str) -> str:
    """A short first line that is followed by a blank line."""
    lines = text.strip().split("\n", 2)
    alone = len(lines) == 3 and not lines[1].strip()
    return lines[0] if alone and len(lines[0]) <= _FIRST_LINE_LENGTH else ""


def _heading(text: str) -> str:
    """The first heading of a markdown text, outside of front matter and code."""
    found = _HEADING.search(_FENCED_CODE.sub("", _FRONT_MATTER.sub("", text)))
    if not found:
        return ""
    title = (found[1] or found[2]).rstrip()
    closed = title.rstrip("#")
    return closed.rstrip() if closed.endswith((" ", "\t")) else title


def _jsonl(text: str, name: str, field: str) -> list[Context]:
    contexts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ContextError(f"{where}: not JSON ({_reason(error)}): write one object a line") from error
        if not isinstance(record, dict):
            raise ContextError(f"{where}: not a JSON object: write one object a line")
        title = record.get("title") or ""
        if not isinstance(title, str):
            raise ContextError(f"{where}: its 'title' is not text: write it in quotes")
        contexts.append(_context(*_titled(_record_text(record, where, field), title), where))
    if not contexts:
        raise ContextError(f"{name}: empty, there is no line with an object: write one object a line")
    return contexts


def _record_text(record: dict[str, Any], where: str, field: str) -> str:
    value = record.get(field)
    if isinstance(value, str):
        return value
    if "messages" in record:
        return _conversation(record["messages"], where)
    if field in record:
        raise ContextError(f"{where}: the field '{_plain(field)}' is not text: write it in quotes or name another")
    there = ", ".join(_plain(key)[:40] for key in list(record)[:20]) or "none"
    raise ContextError(f"{where}: no field '{_plain(field)}' (there are: {there}): name the field that holds the text")


def _conversation(messages: object, where: str) -> str:
    """`User: …`, `Assistant: …` and `System: …` lines."""
    lines = []
    for message in messages if isinstance(messages, list) else [messages]:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ("user", "assistant", "system") or not isinstance(content, str):
            raise ContextError(
                f"{where}: 'messages' is not a list of {{role, content}} with the roles user, assistant and system "
                "and text as content: write it so"
            )
        if content.strip():
            lines.append(f"{role.capitalize()}: {content.strip()}")
    return "\n".join(lines)


def _html(text: str, name: str) -> tuple[str, str]:
    """Text and title of a page."""
    try:
        page = _Page(text, _SKIPPED)
        if page.open:  # never closed: the rest of the page is in it
            page = _Page(text, _SKIPPED - {*page.open} | {"script", "style"})
    except Exception as error:  # html.parser asserts that declarations are well-formed
        raise ContextError(f"{name}: not HTML that can be read ({_reason(error)}): save it as text") from error
    return "\n\n".join(page.paragraphs), page.title


class _Page(HTMLParser):
    """The title and the paragraphs of an HTML page, and which of the skipped elements are open at its end."""

    def __init__(self, text: str, skipped: set[str]) -> None:
        super().__init__()
        self.title = ""
        self.paragraphs: list[str] = []
        self._paragraph: list[str] = []
        self.open: list[str] = []
        self._skipped = skipped
        self._inside = ""  # "title" or "pre"
        self.feed(text)
        self.close()
        self._end_paragraph()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self._skipped:
            self.open.append(tag)
        if self.open:
            return
        self._border(tag)
        if tag in ("td", "th"):
            self._paragraph.append(" | ")
        if tag in ("title", "pre"):
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            del self.open[self.open.index(tag):]
        elif not self.open:
            self._border(tag)
            if tag == self._inside:
                self._inside = ""

    def handle_data(self, data: str) -> None:
        if self.open:
            return
        if self._inside == "title":
            self.title += data
        else:
            self._paragraph.append(data if self._inside == "pre" else _WORDS.sub(" ", data))

    def _border(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._end_paragraph()
        elif tag in _LINES:
            self._paragraph.append("\n")

    def _end_paragraph(self) -> None:
        text = "".join(self._paragraph)
        if self._inside != "pre":
            lines = (" ".join(line.split()).removeprefix("| ") for line in text.split("\n"))
            text = "\n".join(line for line in lines if line)
        if text.strip():
            self.paragraphs.append(text.strip("\n"))
        self._paragraph = []


def _pdf_text(data: bytes, name: str, max_bytes: int, notices: list[str]) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it warns about ends in text or in our error
    pages: list[str] = []
    encrypted, size = False, 0
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        encrypted = reader.is_encrypted
        for page in reader.pages:
            pages.append(page.extract_text().strip())
            size += len(pages[-1])
            if size > max_bytes:
                break
    except Exception as error:  # damaged files raise of every kind
        advice = "it is encrypted: save it without a password" if encrypted else "save it again, or as text"
        raise ContextError(f"{name}: not a PDF that can be read ({_reason(error)}): {advice}") from error
    if size > max_bytes:
        raise ContextError(f"{name}: the PDF has over {max_bytes} characters of text: split it into smaller files")
    if not size:
        raise ContextError(f"{name}: the PDF has no text, it may be a scan: run text recognition (OCR) on it first")
    if blank := pages.count(""):
        notices.append(f"{name}: {blank} of {len(pages)} pages have no text")
    text = "\n\n".join(page for page in pages if page).replace("\0", "")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _docx_text(data: bytes, name: str, max_bytes: int) -> str:
    import docx

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = [member.file_size for member in archive.infolist()]
    except Exception as error:
        raise ContextError(f"{name}: not a Word file, or one with a password: save it again as .docx") from error
    if sum(sizes) > _DOCX_EXPANSION * max_bytes or len(sizes) > _DOCX_MEMBERS:
        size = f"{sum(sizes)} bytes in {len(sizes)} members"
        raise ContextError(f"{name}: unpacks to {size}, which is refused: save its text as .txt")
    try:
        body = docx.Document(io.BytesIO(data)).element.body
        for copy in list(body.iter(_FALLBACK, _WORD_XML + "moveFrom")):
            copy.getparent().remove(copy)
        return "\n\n".join(block for block in _docx_blocks(body) if block.strip())
    except Exception as error:  # damaged files raise of every kind
        raise ContextError(f"{name}: a damaged Word file ({_reason(error)}): save it again as .docx") from error


def _docx_blocks(element: Any) -> Iterator[str]:
    """Paragraphs and tables below an XML element, in order; a table is a line a row, its cells between bars."""
    for child in element:
        if child.tag == _WORD_XML + "p":
            parts = child.iter(_WORD_XML + "t", _WORD_XML + "sym", _FORMULA, *_WHITE)
            yield "".join(_WHITE.get(part.tag) or part.text or _symbol(part) for part in parts).strip()
        elif child.tag == _WORD_XML + "tbl":
            yield "\n".join(_docx_blocks(child))
        elif child.tag == _WORD_XML + "tr":
            cells = (cell for cell in child if cell.tag in (_WORD_XML + "tc", _WORD_XML + "sdt"))
            yield " | ".join(" ".join(_docx_blocks(cell)) for cell in cells)
        else:
            yield from _docx_blocks(child)


def _symbol(element: Any) -> str:
    """The letter of a w:sym element; one that has no meaning outside of its font is shown as missing."""
    code = int(element.get(_WORD_XML + "char", "0"), 16)
    if code < 0xE000:
        return chr(code) if code else ""
    greek = element.get(_WORD_XML + "font") == "Symbol"
    found = chr(code - 0xF000).translate(_SYMBOLS) if greek and 0xF020 <= code < 0xF07F else ""
    return found or "\ufffd"


# --- long contexts -> pieces ----------------------------------------------------------------------------------------


def split_context(context: Context, limit: int, count: Callable[[str], int]) -> list[Context]:
    """[context] where it has at most `limit` tokens, otherwise pieces of at most `limit` tokens, filled greedily.

    A piece ends at the last paragraph border that fits, else at the last sentence, line, comma (of scripts without
    spaces) or word border, and between two letters only where a word is longer than a piece. Nothing but white space
    is lost. Pieces after the first have the title in front (counted; not one of more than half the limit) and the
    source "{source}#2", "{source}#3".
    count: text -> tokens; called on texts of about a piece, some 2·log2(letters of a piece) times for each.
    Raises ContextError for a single letter of more than `limit` tokens.
    """
    if count(context.text) <= limit:
        return [context]
    text = context.text.strip()
    borders = [_ends(pattern, text) for pattern in _BORDERS]
    letters = range(1, len(text) + 1)
    pieces: list[Context] = []
    title = f"{context.title}\n\n" if context.title and count(f"{context.title}\n\n") <= limit // 2 else ""
    head, source, start = "", context.source, 0

    def fits(end: int) -> bool:
        return count(head + text[start:end].rstrip()) <= limit

    while start < len(text):
        stop = _furthest(letters, start, fits)
        if not stop:
            raise ContextError(f"{_plain(source)}: the letter '{_plain(text[start])}' has more than {limit} tokens: "
                               "allow longer pieces")
        stop = _best_border(borders, start, stop, fits)
        pieces.append(Context(head + text[start:stop].rstrip(), context.title, source))
        head, source, start = title, f"{context.source}#{len(pieces) + 1}", stop
    return pieces


def _ends(pattern: re.Pattern[str], text: str) -> array[int]:
    ends = array("q", (found.end() for found in pattern.finditer(text)))
    ends.append(len(text))
    return ends


def _furthest(ends: Sequence[int], start: int, fits: Callable[[int], bool]) -> int:
    """The last of the ends after `start` that fits, or 0. Doubles steps, then halves: counts few and short texts."""
    low = high = bisect_right(ends, start)
    first, step = low, 1
    while high < len(ends) and fits(ends[high]):
        low, high, step = high + 1, high + step, step * 2
    high = min(high, len(ends))
    while low < high:
        middle = (low + high) // 2
        if fits(ends[middle]):
            low = middle + 1
        else:
            high = middle
    return ends[low - 1] if low > first else 0


def _best_border(borders: list[array[int]], start: int, stop: int, fits: Callable[[int], bool]) -> int:
    """The last border of the best kind in (start, stop] that fits and leaves enough; else of a word, else `stop`."""
    least = start + _LEAST * (stop - start)
    for ends, after in [*((ends, least) for ends in borders), (borders[-1], start)]:
        at = bisect_right(ends, stop) - 1
        while at >= 0 and ends[at] > after:
            if fits(ends[at]):
                return ends[at]
            at -= 1
    return stop
