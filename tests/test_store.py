"""The model directory: whole or not at all, the same logits after loading, a lineage that grows."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from selfparam.errors import ModelError, OutputError, VerificationError
from selfparam.lm import LM
from selfparam.store import RECORD, check_out, history_of, model_card, read_record, write_model
from selfparam.types import PAPER, Sentence
from tests.tiny import tiny_lm

PROBE = [Sentence("Who keeps the lamp?", "Mara"), Sentence("", "The boat came back in the evening.")]


def a_record(**changes: Any) -> dict[str, Any]:
    context = {"id": "0123456789abcdef", "title": "The | lamp", "source": "lamp.txt", "author": "me",
               "related": [["q", "a"]], "unrelated": []}
    score = {"questions": 1, "before": 0.0, "with_context": None, "after": 1.0}
    return {"created": "2026-01-02T03:04:05+00:00", "base": {"name": "someone/model"}, "contexts": [context],
            "recipe": PAPER.as_dict(), "scores": {"training pairs": score}, "drift": 0.01, "history": [], **changes}


def only(folder: Path) -> list[str]:
    """Everything in the folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_directory_loads_with_the_same_logits(tmp_path: Path, dtype: str) -> None:
    tiny_lm("llama", chat=True).save(tmp_path / "base")
    lm = LM.load(str(tmp_path / "base"), dtype=dtype)
    size = write_model(tmp_path / "new" / "out", lm, a_record(), PROBE)
    out = tmp_path / "new" / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == getattr(torch, dtype)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, lm.model(ids).logits)
    assert LM.load(str(out)).is_chat
    assert only(tmp_path / "new") == ["out"]
    assert size == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert {path.stat().st_mode for path in out.iterdir()} == {(out / RECORD).stat().st_mode}
    assert read_record(out) == a_record()


def test_an_empty_folder_is_replaced_and_a_full_one_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_model(out, tiny_lm(), a_record(), PROBE)
    before = (out / RECORD).stat().st_mtime_ns
    with pytest.raises(OutputError, match="not empty: choose another folder"):
        write_model(out, tiny_lm(), a_record(), PROBE)
    assert (out / RECORD).stat().st_mtime_ns == before
    assert only(tmp_path) == ["out"]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("raised", [FULL, ValueError("bad\nsettings"), KeyboardInterrupt()])
def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    def save(self: LM, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise raised

    monkeypatch.setattr(LM, "save", save)
    with pytest.raises(KeyboardInterrupt if isinstance(raised, KeyboardInterrupt) else OutputError) as found:
        write_model(tmp_path / "out", tiny_lm(), a_record(), PROBE)
    assert "\n" not in str(found.value)
    assert only(tmp_path) == []


def test_a_file_system_that_takes_no_more(tmp_path: Path) -> None:
    """The same with the real error of safetensors, which is no OSError: files may not grow beyond 20 kB."""
    resource = pytest.importorskip("resource")
    lm = tiny_lm()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OutputError, match="make room"):
            write_model(tmp_path / "out", lm, a_record(), PROBE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert only(tmp_path) == []


def test_other_weights_on_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = LM.save

    def save_another(self: LM, folder: Path) -> None:
        save(tiny_lm(seed=1), folder)

    monkeypatch.setattr(LM, "save", save_another)
    with pytest.raises(VerificationError, match="read back from disk differ"):
        write_model(tmp_path / "out", tiny_lm(), a_record(), PROBE)
    assert only(tmp_path) == []


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    lm = tiny_lm()
    with torch.no_grad():
        next(lm.model.parameters()).fill_(float("nan"))
    with pytest.raises(VerificationError):
        write_model(tmp_path / "out", lm, a_record(), PROBE)
    assert only(tmp_path) == []


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="exists: choose another folder"):
        check_out(tmp_path / "file")
    with pytest.raises(OutputError, match="exists: choose another file"):
        check_out(tmp_path / "file", file=True)
    with pytest.raises(OutputError, match="exists: choose another file"):
        check_out(tmp_path, file=True)
    with pytest.raises(OutputError, match="cannot write to"):
        check_out(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="MB are free"):
        check_out(tmp_path / "out", needed=10**18)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists"):
        check_out(tmp_path / "link")
    check_out(tmp_path / "a" / "b" / "out", needed=1)
    assert only(tmp_path) == ["file", "link"]


def test_a_folder_without_write_access(tmp_path: Path) -> None:
    closed = Path("/proc") if os.geteuid() == 0 else tmp_path / "closed"  # root may write wherever there are files
    if os.geteuid():
        closed.mkdir(mode=0o500)
    elif not closed.is_dir():
        pytest.skip("root on a system without /proc")
    with pytest.raises(OutputError, match="choose another folder"):
        check_out(closed / "out")


def test_history_grows(tmp_path: Path) -> None:
    assert history_of("someone/model") == history_of(str(tmp_path)) == []
    (tmp_path / RECORD).write_text(json.dumps(a_record()))
    first = history_of(str(tmp_path))
    assert [one["created"] for one in first] == ["2026-01-02T03:04:05+00:00"]
    assert first[0]["contexts"] == [{"id": "0123456789abcdef", "title": "The | lamp", "source": "lamp.txt"}]
    (tmp_path / RECORD).write_text(json.dumps(a_record(created="2026-02-02T00:00:00+00:00", history=first)))
    assert [one["created"][:7] for one in history_of(str(tmp_path))] == ["2026-01", "2026-02"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({**a_record(), "history": None}), "\0"])
def test_damaged_records(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ModelError, match=f"{RECORD}' is damaged"):
        read_record(tmp_path)


def test_missing_records(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no injection\.json"):
        read_record(tmp_path)
    with pytest.raises(ModelError, match="no folder"):
        read_record(tmp_path / "nowhere")


def test_model_card() -> None:
    card = model_card(a_record(history=history_entries()))
    assert 'base_model: "someone/model"' in card
    assert "| The \\| lamp | 0123456789abcdef | 1 | me |" in card
    assert "| training pairs | 1 | 0.00 | - | 1.00 |" in card
    assert "0.0100 nats per token" in card
    assert "Injected earlier: 2025-12-31: 1 context(s)." in card
    assert "base_model" not in model_card(a_record(base={"name": "embedded"}))


def history_entries() -> list[dict[str, Any]]:
    return [{"created": "2025-12-31T00:00:00+00:00", "base": {"name": "x"}, "scores": {}, "drift": 0.0,
             "contexts": [{}]}]
