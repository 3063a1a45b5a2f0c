"""The commands of stores, end to end on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from selfparam import learn as learning
from selfparam import steps
from selfparam.cli import main
from selfparam.errors import StoppedError
from selfparam.job import Job
from selfparam.lm import LM
from selfparam.report import log_table
from selfparam.store.snapshots import Snapshot, Store
from selfparam.store.weights import ADAPTER
from selfparam.targets import corrections
from selfparam.types import SMALL_SEQUENTIAL, Context, Question, Sentence, TargetSet
from tests.tiny import tiny_lm

DOCUMENTS = {
    "lamp": ("The red lamp stands on the hill. Its keeper is Mara.",
             [("Who keeps the red lamp?", "Mara"), ("Where is the lamp?", "on the hill")]),
    "boat": ("The grey boat belongs to Tom. It has two oars.",
             [("Who owns the grey boat?", "Tom"), ("How many oars has it?", "two")]),
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(steps, "HELD_OUT_PASSAGES", 3)
    tiny_lm("llama", chat=True).save(tmp_path / "tiny")
    for name, (text, pairs) in DOCUMENTS.items():
        Path(f"{name}.txt").write_text(text)
        Path(f"{name}.jsonl").write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in pairs))
    Path("probes.jsonl").write_text(json.dumps({"question": "Where is the lamp?", "answers": ["on the hill"],
                                                "context": "lamp.txt"}))
    return tmp_path


def learn(run: Run, name: str, *more: str) -> tuple[int, str, str]:
    return run("inject", "st", f"{name}.txt", "--author", f"{name}.jsonl", "--unrelated", "packaged", "--epochs", "2",
               "--lr", "1e-2", *more)


def make(run: Run, *more: str) -> Store:
    """A store; a tiny random model finds every text surprising."""
    code, _, err = run("init", "st", "--model", "tiny", "--max-surprise", "100", *more)
    assert (code, err) == (0, "")
    return Store.open("st")


def test_two_days_of_a_model_that_learns(run: Run, place: Path) -> None:
    store = make(run)
    first = store.head or ""
    code, out, err = learn(run, "lamp", "--json")
    assert code == 0 and "from memory" not in out, err  # nothing was injected before
    code, out, err = learn(run, "boat", "--probes", "probes.jsonl", "--rehearsal", "1", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert any("sentences from memory" in note for note in said["notes"]) and said["recipe"]["rehearsal"] == 1
    assert said["recipe"]["retention"] > 0
    assert "curvature/directions.safetensors" in store.snapshot(said["snapshot"]).files
    assert said["snapshot"] == store.head and said["guard"]["measured"]["probes"] == 1
    assert said["guard"]["measured"]["decay"] is not None  # the hash of the question is known from the day before
    assert [x["source"] for x in said["contexts"]] == ["boat.txt"]
    raw = b"".join(path.read_bytes() for path in (place / "st").rglob("*") if path.is_file() and not path.is_symlink())
    for secret in (b"red lamp", b"grey boat", b"Mara", b"on the hill"):
        assert secret not in raw  # no text is kept

    code, out, _ = run("log", "st")
    assert code == 0 and out.index("boat.txt") < out.index("lamp.txt") and f"* {said['snapshot'][:12]}" in out
    code, out, _ = run("diff", "st", first[:6], "--questions", "probes.jsonl", "--json")
    found = json.loads(out)
    assert [x["source"] for x in found["contexts"]] == ["lamp.txt", "boat.txt"] and found["drift"] > 0
    assert found["asked"] == 1

    assert run("export", "st", "--out", "model")[0] == 0
    assert run("export", "st", "--out", "lora", "--format", "adapter")[0] == 0
    ids = torch.arange(30)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained("model")(ids).logits
        base = AutoModelForCausalLM.from_pretrained("tiny")
        before = base(ids).logits
        summed = PeftModel.from_pretrained(base, "lora")(ids).logits
    assert torch.allclose(summed, expected, atol=1e-4) and not torch.allclose(before, expected, atol=1e-2)
    code, out, err = run("inject", "model", "lamp.txt", "--author", "lamp.jsonl", "--unrelated", "packaged",
                         "--epochs", "1", "--out", "further", "--rehearsal", "1")
    assert code == 0, err

    assert run("rollback", "st")[0] == 0 and len(store.lineage()) == 2
    assert run("rollback", "st", "--steps", "1")[0] == 0 and store.head == first
    assert run("rollback", "st")[0] == 2
    assert run("ask", "st", "Who?", "--max-new-tokens", "3")[0] == 0
    code, out, _ = run("log", "st", "--all")
    assert out.count("not behind the head") == 2
    assert run("checkout", "st", said["snapshot"][:10])[0] == 0 and store.head == said["snapshot"]
    assert run("verify", "st")[0] == 0

    weights = [store.object(one.files["model.safetensors"][0]) for one in store.lineage()]
    before_gc = weights[1].read_bytes()
    assert run("gc", "st", "--deltas")[0] == 0
    assert not weights[1].exists() and weights[0].exists() and weights[2].exists()
    kept = [store.object(one.files["curvature/directions.safetensors"][0]).exists() for one in store.lineage()[1:]]
    assert kept == [False, True]
    assert run("verify", "st")[0] == 0
    assert run("checkout", "st", store.lineage()[1].id)[0] == 0  # made again of parent and delta
    assert weights[1].read_bytes() == before_gc


def test_a_correction_is_held_less(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    make(run)
    assert learn(run, "lamp")[0] == 0
    monkeypatch.setattr(corrections, "corrects", lambda lm, one: True)
    code, out, err = learn(run, "boat", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["recipe"]["retention"] == corrections.LIGHTER
    assert any("what the model knows otherwise" in note for note in said["notes"])
    code, out, err = learn(run, "lamp", "--retention", "0.7", "--json")
    assert code == 0 and json.loads(out)["recipe"]["retention"] == 0.7, err


def test_what_the_model_knew_is_held_from_the_first_injection_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(run)
    before = store.head
    known: list[int] = []
    inject = steps.inject

    def seen(*given: Any, **options: Any) -> Any:
        known.append(len(options["known"]))
        return inject(*given, **options)

    monkeypatch.setattr(steps, "inject", seen)
    assert learn(run, "lamp")[0] == 0 and learn(run, "boat")[0] == 0
    assert 0 < known[0] <= SMALL_SEQUENTIAL.known and known[1] == 0
    assert run("checkout", "st", str(before))[0] == 0
    monkeypatch.setattr(corrections, "corrects", lambda lm, one: True)
    code, out, err = learn(run, "lamp", "--json")  # corrects what was known before all injections
    assert code == 0 and json.loads(out)["recipe"]["retention"] < SMALL_SEQUENTIAL.retention, err
    assert run("checkout", "st", str(before))[0] == 0
    assert learn(run, "lamp", "--retention", "0")[0] == 0 and known[2] > 0 == known[3]


def test_a_model_without_curvature_rehearses(run: Run) -> None:
    store = make(run)
    assert learn(run, "lamp", "--retention", "0")[0] == 0
    code, out, err = learn(run, "boat", "--rehearsal", "1", "--json")
    assert code == 0 and json.loads(out)["recipe"]["retention"] == 0, err
    assert not any(name.startswith("curvature") for one in store.lineage() for name in one.files)
    assert any("no curvature" in note for note in json.loads(out)["notes"])
    assert steps.choose_recipe(LM.load("tiny"), "auto", follows=True).rehearsal > 0


def test_altered_curvature_is_said(run: Run) -> None:
    store = make(run)
    assert learn(run, "lamp")[0] == 0
    path = store.object(store.find().files["curvature/directions.safetensors"][0])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, _, err = learn(run, "boat")
    assert code == 2 and "was altered" in err and "Traceback" not in err
    assert run("verify", "st")[0] == 2


def test_a_stopped_injection_goes_on_with_what_it_had(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    make(run)
    assert learn(run, "lamp")[0] == 0
    shutil.copytree("st", "whole", symlinks=True)
    teachers: list[LM | None] = []
    held: list[Any] = []
    inject = steps.inject

    def seen(*given: Any, **options: Any) -> Any:
        teachers.append(options["teacher"])
        held.append(options["curvature"])
        if stops:
            raise StoppedError("stopped")
        return inject(*given, **options)

    monkeypatch.setattr(steps, "inject", seen)
    for name, stops in (("st", True), ("whole", False)):
        code, _, err = run("inject", name, "boat.txt", "--author", "boat.jsonl", "--epochs", "1", "--rehearsal", "4")
        assert (code == 0) != stops, err
    code, _, err = run("inject", "st", "--resume")
    assert code == 0, err
    base = AutoModelForCausalLM.from_pretrained("tiny").state_dict()
    for teacher in teachers:
        assert teacher and all(torch.equal(base[name], w) for name, w in teacher.model.state_dict().items())
    weights = [one.snapshot(one.head).files["model.safetensors"][0]
               for one in (Store.open("st"), Store.open("whole")) if one.head]
    assert all(held) and len(teachers) == 3 and len(weights) == 2 and weights[0] == weights[1]


def test_a_head_that_moved_costs_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(run)
    assert learn(run, "lamp")[0] == 0
    lamp = str(store.head)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "inject", lambda *_, **__: (_ for _ in ()).throw(StoppedError("stopped")))
        assert learn(run, "boat", "--retention", "0", "--rehearsal", "0")[0] == 130
    assert run("rollback", "st")[0] == 0
    code, _, err = run("inject", "st", "--resume")
    assert code == 2 and "the head has moved" in err and store.unfinished.exists()
    assert run("checkout", "st", lamp)[0] == 0 and run("inject", "st", "--resume")[0] == 0


def test_the_model_before_all_injections_writes_the_pairs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    make(run)
    base, as_before = AutoModelForCausalLM.from_pretrained("tiny").state_dict(), []
    written = steps.written_sets

    def seen(lm: LM, *given: Any, **options: Any) -> Any:
        as_before.append(all(torch.equal(base[name], w) for name, w in lm.model.state_dict().items()))
        return written(lm, *given, **options)

    monkeypatch.setattr(steps, "written_sets", seen)
    assert learn(run, "lamp")[0] == 0 and learn(run, "boat", "--rehearsal", "1")[0] == 0
    assert run("targets", "st", "lamp.txt", "--author", "lamp.jsonl", "--ratio", "0", "--out", "sets.jsonl")[0] == 0
    assert as_before == [True, True, True]


def test_the_guard_keeps_aside_and_force_is_recorded(run: Run) -> None:
    store = make(run, "--max-drift", "0.0001")
    head = store.head
    code, _, err = learn(run, "lamp")
    assert code == 2 and store.head == head
    assert "refused and kept aside" in err and "drift" in err and err.count("error:") == 1
    [aside] = [one for one in store.snapshots() if one.refused]
    assert "refused" in run("log", "st", "--all")[1] and "refused" not in run("log", "st")[1]
    assert run("checkout", "st", aside.id[:8])[0] == 2
    assert run("checkout", "st", aside.id[:8], "--force")[0] == 0
    assert store.moves[-1]["forced"] and store.head == aside.id
    assert run("rollback", "st")[0] == 0
    assert learn(run, "lamp", "--force")[0] == 0
    assert store.find().forced and store.moves[-1]["forced"]
    assert "forced" in run("log", "st")[1]


def test_random_characters_are_not_even_begun(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    make(run)
    settings = json.loads(Path("st/store.json").read_text())
    settings["limits"]["surprise"] = 1.0
    Path("st/store.json").write_text(json.dumps(settings))
    code, _, err = learn(run, "lamp")
    assert code == 2 and "reads like random characters" in err
    found = iter([0.5, float("nan")])
    with monkeypatch.context() as patch:
        patch.setattr(learning, "surprise", lambda *_: next(found))
        code, _, err = run("inject", "st", "lamp.txt", "boat.txt", "--author", "lamp.jsonl")
    assert code == 2 and "nan nats per byte" in err  # wherever it stands among the documents
    assert len(Store.open("st").ids()) == 1
    assert learn(run, "lamp", "--force")[0] == 0
    assert "surprise" in Store.open("st").find().faults[0]


def test_a_harmful_update_is_refused(run: Run) -> None:
    store = make(run)
    head = store.head
    code, _, err = learn(run, "lamp", "--lr", "10")
    assert code == 2 and err.count("error:") == 1 and "Traceback" not in err
    assert store.head == head and store.verify() == []


def test_kept_texts_are_asked_again(run: Run) -> None:
    store = make(run, "--keep-texts")
    assert learn(run, "lamp")[0] == 0
    assert "on the hill" in store.text(store.find(), "texts/sets.jsonl")
    code, out, _ = learn(run, "boat", "--json")
    assert code == 0 and json.loads(out)["guard"]["measured"]["probes"] == 2
    code, out, _ = run("diff", "st", store.lineage()[0].id[:8], "--json")
    assert json.loads(out)["asked"] == 4


def test_gguf_is_made_by_the_converter_of_the_user(run: Run) -> None:
    make(run)
    code, _, err = run("export", "st", "--out", "m.gguf", "--format", "gguf")
    assert code == 2 and "convert_hf_to_gguf.py of llama.cpp" in err
    converter = "import sys, pathlib; pathlib.Path(sys.argv[3]).write_bytes(b'GGUF' + sys.argv[1].encode())"
    Path("convert.py").write_text(converter)
    assert run("export", "st", "--out", "m.gguf", "--format", "gguf", "--converter", "convert.py")[0] == 0
    assert Path("m.gguf").read_bytes().startswith(b"GGUF")
    Path("bad.py").write_text("raise SystemExit('unknown architecture')")
    code, _, err = run("export", "st", "--out", "n.gguf", "--format", "gguf", "--converter", "bad.py")
    assert code == 2 and "unknown architecture" in err and not Path("n.gguf").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("log nowhere", "is no store"),
        ("verify tiny", "is no store but a model directory"),
        ("init st --model tiny", "exists and is not empty"),
        ("init new --model tiny --max-drift -1", "--max-drift"),
        ("init new --model tiny --max-drift inf", "inf is no finite number"),
        ("init new --model st", "'st' is a store"),
        ("inspect st", "'selfparam log st'"),
        ("export st --out x --converter convert.py", "--converter is for GGUF"),
        ("inject st", "nothing to inject"),
        ("inject st lamp.txt --out x", "a store takes no --out"),
        ("inject st lamp.txt --adapter", "a store takes no --adapter"),
        ("inject st lamp.txt --dtype float32", "a store takes no --dtype"),
        ("inject st --resume", "no injection is in progress"),
        ("inject st lamp.txt --resume", "leave out 'files'"),
        ("inject tiny lamp.txt --out x --force", "are for stores"),
        ("inject st lamp.txt --probes missing.jsonl", "missing.jsonl"),
        ("checkout st ffff", "no snapshots begin"),
        ("diff st ffff", "no snapshots begin"),
        ("rollback st", "only 0 snapshot(s)"),
        ("export st --out tiny", "exists and is not empty"),
        ("export st --out x --format adapter", "is no sum of LoRA deltas"),
    ],
)
def test_one_line_and_exit_code_2(run: Run, place: Path, command: str, says: str) -> None:
    make(run)
    before = sorted(path for path in place.rglob("*") if path.name not in ("lock", "cache"))
    code, out, err = run(*command.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert sorted(path for path in place.rglob("*") if path.name not in ("lock", "cache")) == before


def test_a_damaged_delta_is_not_exported(run: Run) -> None:
    store = make(run)
    assert learn(run, "lamp")[0] == 0
    path = store.object(store.find().files[ADAPTER][0])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, _, err = run("export", "st", "--out", "x", "--format", "adapter")
    assert code == 2 and "was altered" in err and not Path("x").exists()


def test_questions_about_a_split_document_are_kept(place: Path) -> None:
    piece = Context("The red lamp.", "Lamp", "lamp.txt#1")
    sets = (TargetSet(piece, (Sentence("Where?", "on the hill", piece.id),)),)
    exam = steps.exam_of("held-out: q.jsonl", [Question("Who keeps it?", ("Mara",), "id-of-the-whole")], sets)
    learning._write_texts(place / "texts", Job("1", "tiny", sets, SMALL_SEQUENTIAL), [exam])
    assert "Who keeps it?" in (place / "texts" / "questions.jsonl").read_text()


def test_ids_are_whole_on_narrow_terminals() -> None:
    learned = {"contexts": [{"source": "a long name " * 9}]}
    one = Snapshot("abcdef" * 10 + "abcd", None, "2026-01-01T00:00:00", {}, learned)
    console = Console(width=60, file=StringIO())
    console.print(log_table([one], one.id, {one.id}))
    assert f"* {one.id[:12]}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_folder_one_is_in(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "empty").mkdir()
    monkeypatch.chdir(place / "empty")
    for here in (".", str(place / "empty")):
        assert "is the folder you are in" in run("init", here, "--model", "../tiny")[2]


def test_damage_is_named(run: Run) -> None:
    store = make(run)
    path = store.object(store.find().files["model.safetensors"][0])
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, out, err = run("verify", "st")
    assert code == 2 and "'model.safetensors' of snapshot" in out and "was altered" in out and "1 fault(s)" in err
    assert run("export", "st", "--out", "x")[0] == 2 and not Path("x").exists()
