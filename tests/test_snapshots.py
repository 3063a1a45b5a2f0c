"""The store without models: what is committed stays, what is altered is found, whatever the order of things.

SELFPARAM_EXAMPLES=2500 for the full number of generated inputs of each property; the default is a sample.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfparam.contexts import read_contexts
from selfparam.errors import ContextError, DataError, ModelError, OutputError, SelfParamError, StoreError, TargetError
from selfparam.steps import read_questions
from selfparam.store import read_record
from selfparam.store.guard import Limits, Measured, faults
from selfparam.store.snapshots import FORMAT, Snapshot, Store, is_store, new_store
from selfparam.targets import read_pairs, read_sets
from selfparam.targets.parse import keep_pairs, parse_pairs
from selfparam.types import Context

EXAMPLES = int(os.environ.get("SELFPARAM_EXAMPLES", "60"))
generated = settings(max_examples=EXAMPLES, deadline=None,
                     suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: what is tested here is not power cuts."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def a_store(folder: Path, **options: Any) -> Store:
    with new_store(folder, limits=Limits(), **options) as store:
        add(store, b"base", None)
    return Store.open(folder)


def add(store: Store, data: bytes, parent: str | None, *, wrong: bool = False, forced: bool = False) -> Snapshot:
    with store.writing(), store.room() as room:
        (room / "model.safetensors").write_bytes(data)
        (room / "config.json").write_text("{}")
        if parent:
            (room / "adapter").mkdir()
            (room / "adapter" / "adapter_model.safetensors").write_bytes(data[::-1])
        guard = {"faults": ["drift"] if wrong else [], "forced": forced}
        return store.commit(room, {"contexts": [], "guard": guard, "base": {"name": "x"}}, parent=parent, by="inject")


# --- commits --------------------------------------------------------------------------------------------------------


def test_a_line_of_snapshots(tmp_path: Path) -> None:
    store = a_store(tmp_path / "st")
    first = store.find()
    second = add(store, b"two", first.id)
    assert store.head == second.id and store.lineage() == [first, second]
    assert (store.view(second) / "model.safetensors").read_bytes() == b"two"
    assert store.object(second.files["config.json"][0]).stat().st_mode & 0o777 == 0o444
    assert second.files["config.json"] == first.files["config.json"]  # kept once
    aside = add(store, b"bad", second.id, wrong=True)
    assert store.head == second.id and aside.refused
    insisted = add(store, b"bad too", second.id, wrong=True, forced=True)
    assert store.head == insisted.id
    assert [move["forced"] for move in store.moves] == [False, False, True]
    assert store.find(aside.id[:8]) == aside
    assert store.snapshots()[0] == first
    with pytest.raises(StoreError, match="no snapshots begin"):
        store.find("0000")
    with pytest.raises(StoreError, match="no snapshots begin"):
        store.find(aside.id[:3])
    with store.writing():
        store.move_head(first, by="rollback")
    freed = store.gc()
    assert freed.snapshots == freed.files == 0 and len(store.ids()) == 4
    assert store.gc(everything=True).snapshots == 3
    assert store.ids() == [first.id] and store.verify() == []
    shutil.move(tmp_path / "st", tmp_path / "moved")  # links are relative
    again = Store.open(tmp_path / "moved")
    assert (again.view(again.find()) / "model.safetensors").read_bytes() == b"base"


def test_weights_that_a_delta_makes_again(tmp_path: Path) -> None:
    store = a_store(tmp_path / "st")
    two = add(store, b"two", store.head)
    add(store, b"three", two.id)
    assert store.gc(weights=[two]).files == 1
    assert store.missing(two) == ["model.safetensors"] and store.verify() == []
    with pytest.raises(StoreError, match="not in the store"):
        store.view(two)
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"other")
    assert store.adopt(folder, two) == ["model.safetensors"]
    (folder / "model.safetensors").write_bytes(b"two")
    assert store.adopt(folder, two) == []
    store.object(store.lineage()[0].files["model.safetensors"][0]).unlink()
    assert "is missing" in store.verify()[0]  # the first has no delta


def test_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), new_store(tmp_path / "st", limits=Limits()):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OutputError, match="not empty"), new_store(tmp_path / "full", limits=Limits()):
        pass


@pytest.mark.parametrize("victim", ["store.json", "head.json", "snapshots", "objects"])
@generated
@given(data=st.data())
def test_every_alteration_is_found(victim: str, data: st.DataObject) -> None:
    """A byte changed or cut anywhere: verify names it, and nothing raises but StoreError."""
    with tempfile.TemporaryDirectory() as name:
        store = a_store(Path(name) / "st")
        add(store, b"two", store.head)
        path = store.path / victim
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        file = files[data.draw(st.integers(0, 99)) % len(files)]
        raw = bytearray(file.read_bytes())
        at, flip, cut = data.draw(st.tuples(st.integers(0, 9999), st.integers(1, 255), st.booleans()))
        at %= len(raw)
        if not cut:
            raw[at] ^= flip
        else:
            del raw[at:]
        file.chmod(0o644)
        file.write_bytes(raw)
        try:
            found = Store.open(store.path).verify()
        except StoreError as error:
            found = [str(error)]
        assert all("\n" not in line for line in found)
        if victim in ("snapshots", "objects"):
            assert found


@generated
@given(moves=st.lists(st.tuples(st.sampled_from(["add", "aside", "back", "gc", "all", "again", "deltas"]),
                                st.integers(0, 5)), max_size=8))
def test_any_order_of_things_keeps_the_promise(moves: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        store = a_store(Path(name) / "st")
        for what, n in moves:
            line = store.lineage()
            if what in ("add", "aside"):
                add(store, bytes([n]), line[-1].id, wrong=what == "aside")
            elif what in ("back", "again"):
                choice = line if what == "back" else store.snapshots()
                with store.writing():
                    store.move_head(choice[n % len(choice)], by="checkout")
            elif what == "deltas":
                store.gc(weights=line[1:-1])
            else:
                store.gc(everything=what == "all")
            assert store.verify() == []
            assert store.find().id == store.head
            assert os.listdir(store.path / "work") == []
            after = [one.id for one in store.lineage()]
            assert what != "add" or after[:-1] == [one.id for one in line]


def test_manifests_cannot_name_files_outside(tmp_path: Path) -> None:
    store = a_store(tmp_path / "st")
    path = store.path / "snapshots" / f"{store.head}.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {"../../evil": next(iter(manifest["files"].values()))}
    data = json.dumps(manifest).encode()
    id = hashlib.sha256(data).hexdigest()
    (store.path / "snapshots" / f"{id}.json").write_bytes(data)
    (store.path / "head.json").write_text(json.dumps({"head": id, "moves": []}))
    with pytest.raises(StoreError, match="would leave the folder"):
        store.find()
    (store.path / "head.json").write_text(json.dumps({"head": "../../etc/passwd", "moves": []}))
    with pytest.raises(StoreError, match="damaged"):
        store.find()


# --- formats --------------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden" / "store-format-1"


def test_a_store_of_format_1_opens(tmp_path: Path) -> None:
    """What the first version wrote, byte for byte: whoever changes the format has to keep reading this."""
    shutil.copytree(GOLDEN, tmp_path / "st", symlinks=True)
    store = Store.open(tmp_path / "st")
    for name in ("models", "work"):
        (store.path / name).mkdir(exist_ok=True)
    assert store.verify() == []
    assert [len(one.files) for one in store.lineage()] == [2, 3]
    assert (store.view(store.find()) / "model.safetensors").read_bytes() == b"two"
    add(store, b"three", store.head)
    assert len(store.lineage()) == 3 and store.verify() == []


@pytest.mark.parametrize(("version", "says"), [(FORMAT + 1, "install a newer one"), (0, "damaged"), ("x", "damaged")])
def test_other_formats_are_refused(tmp_path: Path, version: object, says: str) -> None:
    store = a_store(tmp_path / "st")
    (store.path / "store.json").write_text(json.dumps({"format": version}))
    with pytest.raises(StoreError, match=says):
        Store.open(store.path)
    assert is_store(store.path) and not is_store(tmp_path)
    with pytest.raises(StoreError, match="is no store"):
        Store.open(tmp_path)


# --- the guard ------------------------------------------------------------------------------------------------------

GOOD = Measured(True, True, 1e-6, 1e-4, 0.05, 1.0, 3, 0.1, 0.1)


def test_what_the_guard_lets_pass() -> None:
    assert faults(GOOD, Limits()) == []
    assert faults(Measured(True, True, 0.0, 1e-4, 0.3), Limits()) == []


@pytest.mark.parametrize("change", [
    {"weights_finite": False}, {"losses_finite": False}, {"merge_error": 1e-3}, {"merge_error": math.nan},
    {"drift": 0.31}, {"drift": math.nan}, {"drift": math.inf}, {"forgetting": 0.26}, {"decay": 0.61}, {"surprise": 3.0},
])
def test_what_it_refuses(change: dict[str, Any]) -> None:
    bad = Measured(**{**GOOD.__dict__, **change})
    assert len(faults(bad, Limits())) == 1
    json.dumps(bad.as_dict(), allow_nan=False)


@pytest.mark.parametrize("given_limits", [{"drift": -1}, {"drift": "x"}, {"drfit": 1}, {"drift": True}, [], None,
                                          {"drift": math.nan}])
def test_limits_edited_wrongly(tmp_path: Path, given_limits: object) -> None:
    store = a_store(tmp_path / "st")
    (store.path / "store.json").write_text(json.dumps({"format": 1, "limits": given_limits}))
    with pytest.raises(StoreError, match="limit"):
        Store.open(store.path)
    (store.path / "store.json").write_text(json.dumps({"format": 1, "limits": {"drift": 0.5}}))
    assert Store.open(store.path).limits == Limits(drift=0.5)


# --- parsers and loaders: no traceback but ours ---------------------------------------------------------------------

words = st.text(st.sampled_from(list("Question:Answer: {}[]\"\\,\n0123 \t\ud7ff\x00€?")), max_size=300) | st.text(
    max_size=200)
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                      lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=10), x, max_size=3))
names = st.sampled_from(["text", "title", "context", "prompt", "completion", "question", "answer", "answers", "about",
                         "id", "author", "source", "messages"])
lines = st.lists(st.dictionaries(names, values, max_size=5).map(json.dumps) | words, max_size=4).map("\n".join)


@generated
@given(words)
def test_parsing_never_raises(text: str) -> None:
    kept, dropped = keep_pairs(parse_pairs(text), [], context=text)
    assert all(q and a for q, a in kept) and all(n > 0 for n in dropped.values())


@generated
@given(raw=lines.map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary(max_size=200),
       kind=st.sampled_from([".txt", ".md", ".html", ".jsonl", ".pdf", ".docx"]))
def test_files_become_contexts_or_one_line(tmp_path: Path, raw: bytes, kind: str) -> None:
    path = tmp_path / f"file{kind}"
    path.write_bytes(raw)
    try:
        assert all(x.text.strip() for x in read_contexts([path]))
    except ContextError as error:
        assert "\n" not in str(error)


@generated
@given(raw=lines.map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary(max_size=100))
def test_sets_pairs_and_questions_or_one_line(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(raw)
    x = Context("The lamp is red.", "lamp", "lamp.txt")
    for read in (read_sets, lambda p: read_pairs(p, [x]), lambda p: read_questions(p, [x]),
                 lambda p: read_questions(p, None)):
        try:
            read(path)
        except (TargetError, DataError) as error:
            assert str(error).strip()


@generated
@given(raw=st.binary(max_size=100) | values.map(lambda v: json.dumps(v).encode()) | st.dictionaries(
    st.sampled_from(["format", "limits", "head", "moves", "created", "base", "contexts"]), values).map(
        lambda v: json.dumps(v).encode()), name=st.sampled_from(["store.json", "head.json", "injection.json"]))
def test_damaged_folders_or_one_line(tmp_path: Path, raw: bytes, name: str) -> None:
    if not is_store(tmp_path / "st"):
        a_store(tmp_path / "st")
    path = tmp_path / "st" / name
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(raw)
    try:
        store = Store.open(tmp_path / "st")
        store.verify()
        store.lineage()
    except StoreError as error:
        assert str(error).strip()
    except SelfParamError:
        pytest.fail("another kind of error")
    try:
        read_record(tmp_path / "st")
    except ModelError as error:
        assert "\n" not in str(error)
    path.write_bytes(before)
