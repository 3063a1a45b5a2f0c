"""contexts.py: every kind of file, every bad input, and splitting without loss."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import docx
import pytest
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from hypothesis import given
from hypothesis import strategies as st

from selfparam.contexts import from_file, read_contexts, split_context
from selfparam.errors import ContextError
from selfparam.types import Context


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pdf(*pages: str, extra: str = "") -> bytes:
    """A minimal PDF: one text stream a page; `extra` goes into the trailer."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
               "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for i, page in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({page}) Tj ET" if page else ""
        objects.append("<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
                       f"/Resources << /Font << /F1 3 0 R >> >> /Contents {5 + 2 * i} 0 R >>")
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    end = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R {extra} >>\n"
    return out + f"{end}startxref\n{len(out)}\n%%EOF\n".encode()


def word_file(*paragraphs: str) -> bytes:
    file, out = docx.Document(), io.BytesIO()
    for paragraph in paragraphs:
        file.add_paragraph(paragraph)
    file.save(out)
    return out.getvalue()


def refusal(*paths: str | Path, **options: object) -> str:
    """The one line with which the paths are refused; it names the last path."""
    with pytest.raises(ContextError) as caught:
        read_contexts(list(paths), **options)  # type: ignore[arg-type]
    line = str(caught.value)
    assert "\n" not in line
    assert str(paths[-1]) in line or paths[-1] == "-"
    return line


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_txt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.TXT", "The moon\r\n\r\nIt is round.\r\n")
    assert read_contexts([path]) == [Context("The moon\n\nIt is round.", "The moon", str(path))]


@pytest.mark.parametrize("text", ["One line", "Two\nlines", "x" * 81 + "\n\ntext", "Only a first line\n\n"])
def test_txt_without_title(tmp_path: Path, text: str) -> None:
    assert from_file(write(tmp_path / "a.txt", text)).title == ""


@pytest.mark.parametrize(("text", "title"), [
    ("intro\n\n## The *moon* ##\n\ntext", "The *moon*"),
    ("# On C#\ntext", "On C#"),
    ("The moon\n===\n\n# Other", "The moon"),
    ("The moon\n---\n\n# Other", "The moon"),
    ("---\na: b\n# no\n---\n# Yes\ntext", "Yes"),
    ("```sh\n# no\n```\n# Yes", "Yes"),
    ("~~~\n# no", ""),
    ("#no\n\ntext", ""),
    ("# " + "x" * 300, "x" * 200),
])
def test_md(tmp_path: Path, text: str, title: str) -> None:
    context = from_file(write(tmp_path / "a.md", text))
    assert (context.text, context.title) == (text, title)


def test_html(tmp_path: Path) -> None:
    page = """<!doctype html><html><head><title>The
    moon &amp; I</title><style>p {}</style><script>if (a < b) "<p>no</p>"</script></head><body>
    <nav><ul><li>Home</li></ul></nav><h1>Moon</h1><p>It is <b>ro</b>und
    and&nbsp;far.<p>Second.<br>Line<ul><li>one<li>two</ul>
    <table><tr><th>Name<th>Age<tr><td>Ann</td><td>7</td></tr></table>
    <pre>a
  b</pre><svg><title>icon</title></svg>5 < 6</body></html>"""
    for name in ("a.html", "a.htm"):
        context = from_file(write(tmp_path / name, page))
        assert context.title == "The moon & I"
        assert context.text.split("\n\n") == [
            "The moon & I", "Moon", "It is round and far.", "Second.\nLine", "one\ntwo", "Name | Age\nAnn | 7",
            "a\n  b", "5 < 6",
        ]


@pytest.mark.parametrize(("page", "text"), [
    ("<title>Moon</title><p>It is the moon.", "It is the moon."),
    ("<p>Start</p><nav><a>Menu</a><p>Rest.", "Start\n\nMenu\n\nRest."),
    ("<p>Start</p><nav><svg><p>Menu</nav><p>Rest.<script>x", "Start\n\nRest."),
    ("<p>Start</p><noscript>More</noscript>Rest", "Start\n\nMore\n\nRest"),
    ("<select><option>A<option>B</select><button>C</button><button>D</button>", "A\nB\nC\nD"),
])
def test_html_loses_no_text(tmp_path: Path, page: str, text: str) -> None:
    assert from_file(write(tmp_path / "a.html", page)).text == text


def test_html_that_the_parser_refuses_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.html", "<p>text</p><![strange[ x ]]>")
    try:
        assert "text" in from_file(path).text
    except ContextError as error:
        assert "not HTML that can be read" in str(error)


def test_pdf(tmp_path: Path) -> None:
    told: list[str] = []
    path = write(tmp_path / "a.pdf", pdf("The moon is round.", "", "It is far."))
    assert read_contexts([path], notices=told) == [Context("The moon is round.\n\nIt is far.", "", str(path))]
    assert told == [f"{path}: 1 of 3 pages have no text"]


def test_docx(tmp_path: Path) -> None:
    file = docx.Document()
    file.add_paragraph("First.")
    table = file.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "Ann", "7"
    file.add_paragraph("A\tb\nc")
    run = "<w:r><w:t>{}</w:t></w:r>"
    gone = run.format("gone").replace("w:t", "w:delText")
    changes = f"<w:del>{gone}</w:del><w:moveFrom>{run.format('old')}</w:moveFrom><w:ins>{run.format('new')}</w:ins>"
    file.element.body.insert(0, parse_xml(f"<w:p {nsdecls('w')}>{changes}</w:p>"))
    control = f"<w:sdt {nsdecls('w')}><w:sdtContent><w:p>{run.format('Control.')}</w:p></w:sdtContent></w:sdt>"
    file.element.body.insert(1, parse_xml(control))
    formula = "<m:oMath><m:r><m:t>E=m</m:t></m:r></m:oMath>"
    symbols = [f'<w:r><w:sym w:font="{font}" w:char="{char}"/></w:r>' for font, char in
               (("Symbol", "F061"), ("Symbol", "00B1"), ("Wingdings", "F04A"))]
    file.element.body.insert(2, parse_xml(f"<w:p {nsdecls('w', 'm')}>{formula}{''.join(symbols)}</w:p>"))
    file.save(str(tmp_path / "a.docx"))
    assert from_file(tmp_path / "a.docx").text == "new\n\nControl.\n\nE=mα±\ufffd\n\nFirst.\n\nAnn | 7\n\nA\tb\nc"


def test_jsonl(tmp_path: Path) -> None:
    records = [{"text": "one\u2028two", "title": "A  b"}, {"text": "three", "title": None}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path = write(tmp_path / "a.jsonl", "\n\n".join(lines) + "\r\n")
    assert read_contexts([path]) == [Context("A b\n\none\u2028two", "A b", f"{path}:1"),
                                     Context("three", "", f"{path}:3")]
    assert read_contexts([write(tmp_path / "b.jsonl", '{"body": "x", "text": "y"}')], field="body")[0].text == "x"


def test_jsonl_of_the_same_text_under_other_titles(tmp_path: Path) -> None:
    records = [("It is old.", "Bellmere"), ("It is old.", "Tarnford"), ("The  city of\nDor is old.", "City of Dor")]
    lines = [json.dumps({"text": text, "title": title}) for text, title in records]
    texts = [x.text for x in read_contexts([write(tmp_path / "a.jsonl", "\n".join(lines))])]
    assert texts == ["Bellmere\n\nIt is old.", "Tarnford\n\nIt is old.", "The  city of\nDor is old."]


def test_jsonl_conversation(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
             {"role": "assistant", "content": "Hello\nyou"}]
    context = from_file(write(tmp_path / "a.jsonl", json.dumps({"messages": turns})))
    assert context.text == "System: Be kind.\nUser: Hi\nAssistant: Hello\nyou"


def test_standard_input() -> None:
    contexts = read_contexts(["-"], stdin=io.BytesIO(b"Moon\n\nround"))
    assert contexts == [Context("Moon\n\nround", "Moon", "standard input")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    assert from_file(write(tmp_path / "a.txt", "né 月".encode(encoding))).text == "né 月"


# --- several files --------------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("b.txt", "a/z.md", "a/b.txt", ".hidden.txt", ".git/c.txt", "~$x.docx", "pic.png", "Makefile"):
        write(home / name, name)
    write(tmp_path / "secret.txt", "secret")
    write(tmp_path / "home2/secret.txt", "secret")
    os.symlink(tmp_path / "secret.txt", home / "link.txt")
    os.symlink(tmp_path / "home2", home / "linked")
    os.symlink(home / "a", home / "again")
    os.symlink(home / ".hidden.txt", home / "c.txt")
    told: list[str] = []
    contexts = read_contexts([home], notices=told)
    assert [context.text for context in contexts] == ["a/b.txt", "a/z.md", "b.txt", ".hidden.txt"]
    assert told == [f"{home}: skipped 2 file(s) of other kinds (.png, Makefile)",
                    f"{home}: skipped 2 link(s) that leave the folder"]


def test_duplicates_are_kept_once(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.txt", "same"), write(tmp_path / "b.md", "same\n")
    told: list[str] = []
    assert [context.source for context in read_contexts([one, two, tmp_path], notices=told)] == [str(one)]
    assert told == ["left out 3 context(s) with the same text as another"]


def test_a_lone_path_is_a_path(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    assert read_contexts(str(path)) == [from_file(path)]


def test_from_file_wants_one_context(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="gives 2 contexts"):
        from_file(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}'))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("a.txt", b"", "empty"),
    ("a.txt", b" \n\t", "empty"),
    ("a.pdf", b"", "empty"),
    ("a.html", b"<script>x</script>", "empty"),
    ("a.jsonl", b"\n\n", "empty"),
    ("a.docx", word_file(), "empty"),
    ("a.txt", b"\x89PNG\0\xff", "binary"),
    ("a.txt", "text".encode("utf-16-le"), "binary"),
    ("a.txt", "text".encode("utf-32"), "binary"),
    ("a.md", "né".encode("latin-1"), "save it as UTF-8"),
    ("a.jsonl", b'{"text": "\xff"}', "save it as UTF-8"),
    ("a.html", b"\xff\xfea", "save it as UTF-8"),
    ("a.png", b"x", "'.png' is not read"),
    ("README", b"x", "convert it to one of .txt"),
    ("a.pdf", b"not a pdf", "not a PDF"),
    ("a.pdf", pdf("Text.")[:300], "not a PDF"),
    ("a.pdf", pdf(""), "scan"),
    ("a.pdf", pdf("Text.", extra="/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O (" + "x" * 32 + ") /U ("
                                 + "y" * 32 + ") >> /ID [(a) (a)]"), "without a password"),
    ("a.docx", b"\xd0\xcf\x11\xe0", "not a Word file"),
    ("a.docx", word_file("x")[:-30], "not a Word file"),
])
def test_bad_files(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    assert reason in refusal(write(tmp_path / name, content))


@pytest.mark.parametrize(("line", "reason"), [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1]", "not a JSON object"),
    ('{"title": "t", "body": "b"}', "no field 'text' (there are: title, body)"),
    ("{}", "there are: none"),
    ('{"text": 3}', "is not text"),
    ('{"text": null}', "is not text"),
    ('{"text": "x", "title": 7}', "'title' is not text"),
    ('{"text": " "}', "empty"),
    (r'{"text": "\ud800"}', "surrogate"),
    (r'{"text": "x", "title": "\udfff"}', "surrogate"),
    (r'{"text": "a\u0000"}', "NUL"),
    ('{"messages": []}', "empty"),
    ('{"messages": "hi"}', "not a list"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "not a list"),
    ('{"messages": [{"role": "user", "content": null}]}', "not a list"),
])
def test_bad_lines_name_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line)
    refused = refusal(path)
    assert refused.startswith(f"{path}:2: ") and reason in refused


def test_missing_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No such file" in refusal(tmp_path / "none.txt")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300 + ".txt"))
    os.mkfifo(tmp_path / "pipe.txt")
    assert "not a regular file" in refusal(tmp_path / "pipe.txt")
    path = write(tmp_path / "a.txt", "x")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in refusal(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ContextError, match="Permission denied"):
        read_contexts([tmp_path])


def test_names_cannot_break_the_line(tmp_path: Path) -> None:
    with pytest.raises(ContextError) as caught:
        read_contexts([tmp_path / "a\nb\x1b[2J.txt"])
    assert "a?b?[2J.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_without_files(tmp_path: Path) -> None:
    write(tmp_path / "a.png", "x")
    write(tmp_path / ".b.txt", "x")
    assert "no file to read" in refusal(tmp_path)


def test_bad_file_in_a_folder_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "good")
    write(tmp_path / "sub/bad.txt", "")
    with pytest.raises(ContextError, match=r"bad\.txt: the file is empty"):
        read_contexts([tmp_path])


def test_standard_input_refused() -> None:
    assert "empty" in refusal("-", stdin=io.BytesIO())
    assert "larger than 3 bytes" in refusal("-", stdin=io.BytesIO(b"abcd"), max_bytes=3)
    assert "save it as UTF-8" in refusal("-", stdin=io.BytesIO(b"\xff"))


def test_nothing_named() -> None:
    with pytest.raises(ContextError, match="nothing to read"):
        read_contexts([])


def test_max_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "12345")
    assert read_contexts([path], max_bytes=5)[0].text == "12345"
    assert "larger than 4 bytes" in refusal(path, max_bytes=4)


def test_pdf_that_unpacks_to_too_much_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pypdf.PageObject.extract_text", lambda _: "x" * 2001)
    assert "over 2000 characters" in refusal(write(tmp_path / "a.pdf", pdf("x")), max_bytes=2000)


def packed(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def test_docx_bombs(tmp_path: Path) -> None:
    large = write(tmp_path / "large.docx", packed([("word/document.xml", b"0" * 200_001)]))
    assert "unpacks to 200001 bytes" in refusal(large, max_bytes=10_000)
    assert "damaged" in refusal(large, max_bytes=10_001)
    many = write(tmp_path / "many.docx", packed([(f"{i}", b"") for i in range(10_001)]))
    assert "10001 members" in refusal(many)


# --- splitting ------------------------------------------------------------------------------------------------------


def by_words(text: str) -> int:
    return len(text.split())


def by_letters(text: str) -> int:
    return len(text)


def by_parts(text: str) -> int:
    """Like a tokenizer: a special token, and a token for every three letters of a word."""
    return 1 + sum((len(word) + 2) // 3 for word in text.split())


def body(piece: Context, first: bool) -> str:
    return piece.text if first or not piece.title else piece.text.removeprefix(f"{piece.title}\n\n")


WORDS = st.text(alphabet="ab.!?\"。", min_size=1, max_size=8)
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from([" ", "  ", "\n", "\n\n", "\n \n\n", "\t", "\u3000"])), max_size=60)


COUNTS = st.sampled_from([by_words, by_letters, by_parts])


@given(TEXTS, st.sampled_from(["", "T", "The title"]), st.integers(22, 60), COUNTS)
def test_split_loses_nothing(parts: list[tuple[str, str]], title: str, limit: int, count: Callable[[str], int]) -> None:
    context = Context("\n" + "".join(word + white for word, white in parts), title, "s")
    pieces = split_context(context, limit, count)
    if count(context.text) <= limit:
        assert pieces == [context]
        return
    bodies = [body(piece, piece is pieces[0]) for piece in pieces]
    assert "".join("".join(bodies).split()) == "".join(context.text.split())
    assert all(bodies)
    assert all(count(piece.text) <= limit for piece in pieces)
    assert [piece.source for piece in pieces] == ["s", *(f"s#{i}" for i in range(2, len(pieces) + 1))]
    assert all(piece.title == title and piece.id == Context(piece.text).id for piece in pieces)
    assert title == "" or all(piece.text.startswith(f"{title}\n\n") for piece in pieces[1:])


@given(st.lists(WORDS, min_size=1, max_size=60), st.integers(8, 40))
def test_split_at_words_is_greedy(words: list[str], limit: int) -> None:
    letters = [word.translate({ord(mark): "c" for mark in ".!?。"}) for word in words]
    pieces = [piece.text.split() for piece in split_context(Context(" ".join(letters)), limit, by_letters)]
    for piece, following in pairwise(pieces):
        assert len(" ".join([*piece, following[0]])) > limit


def split_words(text: str, limit: int) -> list[str]:
    return [piece.text for piece in split_context(Context(text), limit, by_words)]


def test_split_prefers_paragraphs_then_sentences_then_lines() -> None:
    assert split_words("a b\n\nc d. e\n\nf g", 6) == ["a b\n\nc d. e", "f g"]
    assert split_words("a b. c d e\n\nf", 4) == ["a b.", "c d e\n\nf"]
    assert split_words("a “b.” c d e", 4) == ["a “b.”", "c d e"]
    assert split_words("User: a b\nAssistant: c d e", 6) == ["User: a b", "Assistant: c d e"]
    assert split_words("a b c d e", 3) == ["a b c", "d e"]


def test_split_keeps_the_limit_where_a_longer_text_counts_less() -> None:
    pieces = split_context(Context("a b c. d e"), 4, lambda text: by_words(text) + 3 * text.endswith("."))
    assert [piece.text for piece in pieces] == ["a b c. d", "e"]


def test_split_scripts_without_spaces_at_their_sentences() -> None:
    pieces = split_context(Context("月は丸い。遠い！「白い。」と言う。"), 8, by_letters)
    assert [piece.text for piece in pieces] == ["月は丸い。遠い！", "「白い。」", "と言う。"]


def split_letters(text: str, limit: int, title: str = "") -> list[str]:
    return [piece.text for piece in split_context(Context(text, title), limit, by_letters)]


def test_split_makes_no_tiny_pieces_for_better_borders() -> None:
    assert split_letters("A\n\nbb cc. dd ee ff gg", 14) == ["A\n\nbb cc.", "dd ee ff gg"]
    assert split_letters("月 月は丸い、とても丸い、遠い", 9) == ["月 月は丸い、", "とても丸い、遠い"]


def test_split_of_a_conversation_begins_with_a_role() -> None:
    assert split_letters("User: A b. C.\nAssistant: D. E.", 26) == ["User: A b. C.", "Assistant: D. E."]


def test_split_cuts_only_words_that_are_longer_than_a_piece() -> None:
    assert split_letters("bb cc dd " + "a" * 9, 8) == ["bb cc dd", "a" * 8, "a"]
    assert split_letters("x " + "a" * 8, 8) == ["x", "a" * 8]
    assert split_letters("bb cc dd", 5, "Title") == ["bb cc", "dd"]
    with pytest.raises(ContextError, match="the letter 'b' has more than 8 tokens") as caught:
        split_context(Context("bb", "", "s.txt"), 8, lambda text: 9 * len(text))
    assert str(caught.value).startswith("s.txt")


@pytest.mark.parametrize("white", [" ", ". ", "\n\n"])
def test_split_counts_little(white: str) -> None:
    """The letters that are counted grow with the text, not with its square, whatever its borders."""
    text = white.join(["word"] * 20_000)
    counted = 0

    def count(piece: str) -> int:
        nonlocal counted
        counted += len(piece)
        return by_words(piece)

    assert len(split_context(Context(text), 500, count)) == 40
    assert counted < 25 * len(text)
