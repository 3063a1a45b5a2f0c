"""The command line: injection end to end on a tiny model, and one line and exit code 2 for everything that is wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

import selfparam
from selfparam import report, steps
from selfparam.cli import main
from selfparam.errors import InjectionError, TargetError
from selfparam.inject.memory import fits
from selfparam.lm import LM
from selfparam.report import Journal
from selfparam.store import writing_beside
from selfparam.targets import Report
from selfparam.types import PAPER, SMALL, Context, Question, Sentence, TargetSet
from tests.tiny import tiny_lm

LAMP = "The red lamp stands on the hill. Its keeper is Mara and the light was built in 1911."
PAIRS = [
    ("Who keeps the red lamp?", "Mara"),
    ("When was the light built?", "1911"),
    ("Where is the red lamp?", "on the hill"),
]
OWN = ("--author", "pairs.jsonl")
#: Nothing that takes time: few epochs, one unrelated sentence for each pair from the package.
QUICK = ("--epochs", "2", "--unrelated", "packaged", "--ratio", "1")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a tiny random chat model."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_lm("llama", chat=True).save(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a document and its pairs; the cache and drift are small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(steps, "HELD_OUT_PASSAGES", 3)
    (tmp_path / "lamp.txt").write_text(LAMP)
    lines = [json.dumps({"question": q, "answer": a}) for q, a in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    held_out = {"question": "Who keeps the light?", "answers": ["Mara", "a woman"]}
    (tmp_path / "held-out.jsonl").write_text(json.dumps(held_out))
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


# --- what works -----------------------------------------------------------------------------------------------------


def test_inject_ask_inspect_and_inject_again(run: Run, model: str) -> None:
    code, out, err = run("inject", model, "lamp.txt", *OWN, "--questions", "held-out.jsonl", "--adapter",
                         "--out", "new/one", "--lr", "1e-2", "--json", *QUICK)
    assert (code, err) == (0, "")
    said = json.loads(out)
    record = json.loads(Path("new/one/injection.json").read_text())
    assert {key: said[key] for key in record} == record
    assert record["contexts"][0]["related"] == [list(pair) for pair in PAIRS]
    assert len(record["contexts"][0]["unrelated"]) == 3
    assert record["recipe"]["epochs"] == len(record["losses"]) == 2
    assert set(record["scores"]) == {"the training pairs", "held-out: held-out.jsonl"}
    assert record["scores"]["held-out: held-out.jsonl"]["questions"] == 1
    assert record["drift"] > 0
    assert os.listdir("new") == ["one"]

    ids = torch.arange(30)[None]
    merged = AutoModelForCausalLM.from_pretrained("new/one")
    base = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        expected, before = merged(ids).logits, base(ids).logits
        adapted = PeftModel.from_pretrained(base, "new/one/adapter")(ids).logits
    assert torch.allclose(adapted, expected, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)

    lm, short = LM.load("new/one"), ("--max-new-tokens", "5", "--json")
    code, out, err = run("ask", "new/one", PAIRS[0][0], *short)
    assert (code, err) == (0, "")
    assert json.loads(out)["answer"] == lm.answer([PAIRS[0][0]], max_new_tokens=5)[0]
    code, out, _ = run("ask", "new/one", PAIRS[0][0], "--context", "lamp.txt", *short)
    assert json.loads(out)["answer"] == lm.answer([PAIRS[0][0]], LAMP, max_new_tokens=5)[0]

    code, out, err = run("inject", "new/one", "lamp.txt", *OWN, "--out", "two", *QUICK, "--ratio", "0")
    assert code == 0, err
    assert "drift" in out and "written: two" in out
    code, out, _ = run("inspect", "two")
    assert code == 0
    assert out.count("lamp.txt") == 3  # twice in the lineage, once among the contexts
    code, out, _ = run("inspect", "two", "--json")
    assert [one["created"] for one in json.loads(out)["history"]] == [record["created"]]


@pytest.mark.parametrize(("kind", "options", "says"), [
    ("qwen3_5_text", ("--retention", "0.1"), "sentences are read one to a line"),
    ("falcon_h1", ("--retention", "0.1"), "sentences are read one to a line"),
    ("qwen3_moe", ("--recipe", "paper"), "no dropout"),
])
def test_models_with_recurrent_layers_and_experts(run: Run, kind: str, options: tuple[str, ...], says: str) -> None:
    tiny_lm(kind, chat=True).save(kind)
    code, _, err = run("inject", kind, "lamp.txt", *OWN, "--adapter", "--out", "new", "--lr", "1e-2", *options, *QUICK)
    assert code == 0 and says in err
    assert json.loads(Path("new/injection.json").read_text())["recipe"]["lora_dropout"] == 0
    ids = torch.arange(30)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("new")(ids).logits
        before = AutoModelForCausalLM.from_pretrained(kind)
        adapted = PeftModel.from_pretrained(before, "new/adapter")(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-4)


def test_what_a_model_knew_is_held_where_it_is_asked_for(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[int] = []
    inject = steps.inject

    def seen(*given: Any, **options: Any) -> Any:
        known.append(len(options["known"]))
        return inject(*given, **options)

    monkeypatch.setattr(steps, "inject", seen)
    assert run("inject", model, "lamp.txt", *OWN, "--out", "one", *QUICK)[0] == 0
    assert run("inject", model, "lamp.txt", *OWN, "--out", "two", *QUICK, "--retention", "0.03")[0] == 0
    code, out, err = run("inject", "two", "lamp.txt", *OWN, "--out", "three", *QUICK, "--ratio", "0", "--rehearsal",
                         "0", "--retention", "0.03", "--json")
    assert code == 0 and json.loads(out)["recipe"]["known"] == 100, err
    assert known[0] == 0 < known[1] and known[2] > 0


def test_targets_can_be_edited_and_passed_back(run: Run, model: str, place: Path) -> None:
    code, out, err = run("targets", model, "lamp.txt", *OWN, "--unrelated", "packaged", "--ratio", "1",
                         "--out", "new/sets.jsonl")
    assert (code, err) == (0, "")
    assert "1 contexts, 3 pairs, 3 unrelated" in out
    sets = place / "new" / "sets.jsonl"
    sets.write_text(sets.read_text().replace("1911", "1912"))
    code, out, err = run("inject", model, "lamp.txt", "--targets", "new/sets.jsonl", "--out", "one", "--json", *QUICK)
    assert (code, err) == (0, "")
    assert ["When was the light built?", "1912"] in json.loads(out)["contexts"][0]["related"]
    (place / "other.txt").write_text("Another text about a boat.")
    code, _, err = run("inject", model, "other.txt", "--targets", "new/sets.jsonl", "--out", "two")
    assert code == 2
    assert "no target set about 'other.txt'" in err


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """An OpenAI-compatible endpoint that writes PAIRS, and the requests it got."""
    requests: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            text = "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in PAIRS)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
            head = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
            body = json.dumps({**head, "choices": [choice], "usage": usage})
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", requests
    http.shutdown()
    http.server_close()


def test_an_endpoint_writes_once(
    run: Run, model: str, server: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, requests = server
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    options = ("--endpoint", address, "--author-model", "m", "--pairs", "3", "--ratio", "0", "--json")
    code, out, err = run("targets", model, "lamp.txt", "--out", "a.jsonl", *options)
    assert (code, err) == (0, "")
    assert json.loads(out)["pairs"] == 3
    assert "m: 1 requests, 7 tokens in, 5 out" in json.loads(out)["notes"]
    assert run("targets", model, "lamp.txt", "--out", "b.jsonl", *options)[0] == 0
    assert len(requests) == 1
    assert Path("a.jsonl").read_text() == Path("b.jsonl").read_text()


def test_demo(run: Run) -> None:
    code, out, err = run("demo", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert len(said["questions"]) == 15
    assert said["pairs"]["kept"] > said["pairs"]["same_as_a_question"]
    assert said["f1"]["with_context"] > 0.5
    assert said["f1"]["after"] > said["f1"]["before"] + 0.1
    assert 0 < said["drift"] < 0.05  # 0.013 was measured (one thread); the aim is 0.1


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, selfparam, selfparam.cli\n"
        "try:\n    selfparam.cli.main(['inject', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert selfparam.SMALL and 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(steps.__file__).parents[1])})
    assert done.returncode == 0, done.stderr
    assert "Example: selfparam inject embedded" in done.stdout


def test_the_function_inject_is_not_hidden_by_its_subpackage() -> None:
    from selfparam.inject import inject as function

    assert "selfparam.inject" in sys.modules
    assert selfparam.inject is function
    assert selfparam.LM is LM
    assert selfparam.read_context("lamp.txt").text == LAMP


# --- what is refused ------------------------------------------------------------------------------------------------

BAD_FILES = {
    "empty.txt": b"",
    "binary.txt": b"\x7fELF\x00\x01\x02",
    "latin.txt": "Müller".encode("latin-1"),
    "photo.png": b"\x89PNG",
    "broken.jsonl": b'{"text": "fine"}\n{"text": \n',
    "field.jsonl": b'{"body": "the text is here"}\n',
    "sets.jsonl": b'{"text": "fine"}\n{"prompt": "Who?", "completion": 3}\n',
    "questions.jsonl": b'{"question": "Who?"}\n',
    "elsewhere.jsonl": b'{"question": "Who?", "answers": ["Mara"], "context": "boat.txt"}\n',
    "prompt.txt": b"Write questions!",
    "full/file": b"x",
    "no-model/notes.txt": b"x",
    "bad-model/config.json": b"{",
    "damaged/injection.json": b'{"created": "", "base": {}, "contexts": [{}], "recipe": {}, "scores": {}, '
                              b'"drift": 0.1, "history": []}',
    "two/a.txt": b"One text.",
    "two/b.txt": b"Another text.",
}
#: arguments (MODEL stands for a good one) -> what the line has to say
BAD = [
    ("inject MODEL missing.txt --out out", "missing.txt: cannot be read"),
    ("inject MODEL empty.txt --out out", "empty.txt: the file is empty"),
    ("inject MODEL binary.txt --out out", "binary.txt: holds NUL bytes"),
    ("inject MODEL latin.txt --out out", "latin.txt: not UTF-8"),
    ("inject MODEL photo.png --out out", "photo.png: the kind '.png' is not read"),
    ("inject MODEL broken.jsonl --out out", "broken.jsonl:2: not JSON"),
    ("inject MODEL field.jsonl --out out", "field.jsonl:1: no field 'text' (there are: body)"),
    ("inject MODEL --out out", "nothing to inject: name a file"),
    ("inject MODEL lamp.txt --out full", "'full' exists and is not empty: choose another folder"),
    ("inject MODEL lamp.txt --out lamp.txt", "'lamp.txt' exists: choose another folder"),
    ("inject MODEL lamp.txt --out lamp.txt/out", "cannot write to 'lamp.txt/out'"),
    ("inject MODEL lamp.txt", "Add --out DIR for a model directory"),
    ("inject MODEL lamp.txt --out out --epochs 0", "--epochs"),
    ("inject MODEL lamp.txt --out out --lr inf", "inf is no finite number"),
    ("inject MODEL lamp.txt --out out --ratio inf", "inf is no finite number"),
    ("inject MODEL lamp.txt --out out --seed 99999999999999999999999", "--seed"),
    ("inject MODEL lamp.txt --out out --author pairs.jsonl --retention 0.2 --train full",
     "cannot be held with train = 'full': use 'lora' or 'mlp', or --retention 0"),
    ("inject MODEL --targets sets.jsonl --out out --author-model m", "leave out --author-model"),
    ("inject MODEL --out out --resume --ratio 0", "leave out 'ratio'"),
    ("ask MODEL Who? --context two", "'two' holds 2 documents"),
    ("inspect damaged", "injection.json' is damaged (KeyError"),
    ("inject MODEL lamp.txt --out out --nonsense", "No such option: --nonsense"),
    ("inject MODEL lamp.txt --out out --adapter --train full", "--train full has no adapter"),
    ("inject MODEL lamp.txt --out out --endpoint http://x/v1", "add --author-model"),
    ("inject MODEL lamp.txt --out out --author-model m", "set the environment variable OPENAI_API_KEY"),
    ("inject MODEL lamp.txt --out out --prompt prompt.txt", "'prompt.txt' does not say where the context goes"),
    ("inject MODEL lamp.txt --out out --pairs 1", "nothing usable was written about"),
    ("inject MODEL --targets sets.jsonl --out out", "sets.jsonl line 2: 'completion' is not text"),
    ("inject MODEL --targets missing.jsonl --out out", "cannot read 'missing.jsonl'"),
    ("inject MODEL lamp.txt --out out --questions questions.jsonl", "questions.jsonl line 1: 'answers' is no list"),
    ("inject MODEL lamp.txt --out out --questions elsewhere.jsonl", "line 1: 0 contexts are called 'boat.txt'"),
    ("inject MODEL lamp.txt --out out --unrelated nowhere.txt", "text from 'nowhere.txt'"),
    ("inject MODEL lamp.txt --out out --author ./nobody", "no model directory './nobody'"),
    ("inject MODEL lamp.txt --out out --author pairs.jsonl --lr 1e30 --epochs 5", "use a smaller learning rate"),
    ("inject MODEL lamp.txt --out out --author pairs.jsonl --lr 1e30 --epochs 1 --train full --ratio 0",
     "nats per token (limit"),
    ("inject MODEL lamp.txt --out out --device nonsense", "device 'nonsense'"),
    ("inject ./nowhere lamp.txt --out out", "no model directory './nowhere'"),
    ("inject someone/unknown lamp.txt --out out --offline", "hub names are refused offline"),
    ("inject no-model lamp.txt --out out", "cannot load the model 'no-model'"),
    ("inject bad-model lamp.txt --out out", "cannot load the model 'bad-model'"),
    ("targets MODEL lamp.txt --out pairs.jsonl", "'pairs.jsonl' exists: choose another file"),
    ("targets MODEL missing.txt --out out", "missing.txt: cannot be read"),
    ("ask MODEL Who? --context missing.txt", "missing.txt: cannot be read"),
    ("ask no-model Who?", "cannot load the model 'no-model'"),
    ("inspect nowhere", "no folder 'nowhere'"),
    ("inspect full", "'full' has no injection.json"),
    ("nonsense", "No such command 'nonsense'"),
]


def test_a_model_that_cannot_be_trained_is_refused_before_it_writes_pairs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
                        vocab_size=len(lm.tokenizer))
    lm.model = BertLMHeadModel(config).eval()
    lm.save(tmp_path / "bert")
    monkeypatch.setattr(steps, "written_sets", failing(AssertionError("an author was asked")))
    code, out, err = run("inject", "bert", "lamp.txt", "--out", "out")
    assert (code, out) == (2, "") and "error: 'bert' reads what stands behind a word" in err
    assert not Path("out").exists()


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    run: Run, model: str, place: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, says: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, data in BAD_FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
    before = sorted(place.rglob("*"))
    code, out, err = run(*[model if word == "MODEL" else word for word in arguments.split()])
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert says in lines[0]
    after = sorted(path for path in place.rglob("*") if "cache" not in path.relative_to(place).parts)
    assert after == before


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("where", "error", "code", "says"),
    [
        ("write_pairs", KeyboardInterrupt(), 130, "interrupted: nothing was written"),
        ("train", KeyboardInterrupt(), 130, "stopped: continue with  selfparam inject MODEL --out out --resume"),
        ("save", KeyboardInterrupt(), 130, "stopped: continue with  selfparam inject MODEL --out out --resume"),
        ("save", OSError(28, "No space left on device"), 2, "error: cannot write the model to 'out' (No space left"),
        ("train", OSError(28, "No space left on device"), 2, "error: No space left on device: make room; then"),
        ("train", RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 2, "error: out of memory: use"),
        ("train", torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), 2, "error: out of memory: use a smaller"),
    ],
)
def test_failures_on_the_way(
    run: Run, model: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    where: str, error: BaseException, code: int, says: str,
) -> None:
    owner = {"save": LM, "train": importlib.import_module("selfparam.inject"), "write_pairs": steps}[where]
    author = () if where == "write_pairs" else OWN
    before = sorted(place.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, failing(error))
        found, out, err = run("inject", model, "lamp.txt", *author, "--out", "out", *QUICK)
    assert (found, out) == (code, "")
    *notes, last = err.splitlines()
    assert last.startswith(says.replace("MODEL", model)) and all(one.startswith("note: ") for one in notes)
    if "continue with" in err:
        found, out, err = run("inject", model, "--out", "out", "--resume")
        assert (found, err) == (0, "")
        assert (place / "out" / "injection.json").exists()
        before = sorted([*before, place / "out"])
    assert sorted(path for path in place.iterdir() if path.name != "cache") == before


@pytest.fixture
def interrupted(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hidden folder of an injection into out/ that was interrupted."""
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("selfparam.inject"), "train", failing(KeyboardInterrupt()))
        assert run("inject", model, "lamp.txt", *OWN, "--out", "out", *QUICK)[0] == 130
    assert sorted(path for path in os.listdir() if path.startswith(".")) == [".out.injection"]
    return ".out.injection"


def test_what_was_interrupted_is_dropped_only_for_what_takes_its_place(run: Run, model: str, interrupted: str) -> None:
    code, _, err = run("inject", model, "missing.txt", "--out", "out", "--restart")
    assert code == 2 and "missing.txt" in err and Path(interrupted, "job.json").exists()
    code, _, err = run("inject", "embedded", "--out", "out", "--resume")
    assert code == 2 and f"into '{model}', not 'embedded'" in err and err.count("\n") == 1
    assert run("inject", model, "--out", "out", "--resume")[0] == 0


def test_short_memory_is_no_end(run: Run, model: str, interrupted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any, **__: Any) -> None:
        fits(failing(torch.OutOfMemoryError("out of memory")), last=True)

    for error, kept in ((short, True), (failing(InjectionError("the loss became nan")), False)):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("selfparam.inject"), "train", error)
            assert run("inject", model, "--out", "out", "--resume")[0] == 2
        assert Path(interrupted).exists() == kept


def test_one_injection_at_a_time(run: Run, model: str) -> None:
    with writing_beside("new/out"):
        code, _, err = run("inject", model, "lamp.txt", *OWN, "--out", "new/out", *QUICK, "--restart")
        assert code == 2 and "another process is injecting into 'new/out'" in err and err.count("\n") == 1
    assert not Path("new").exists()


def test_letters_that_stdout_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="latin-1"))
    assert main(["inspect", "nowhere"]) == 2
    print("a \u2192 b", flush=True)


def test_printed_commands_can_be_pasted(run: Run) -> None:
    assert "--model 'a model'" in run("inject", "a model", "lamp.txt")[2]


def test_pairs_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    written = ((Sentence("Who?", "Mara", "x"),), Report(1, 1, 1, {}))
    monkeypatch.setattr(steps, "write_pairs", lambda *_, **__: [written])
    journal = Journal(machine=True)
    sets, _ = steps.pairs_by(cast(Any, SimpleNamespace(id="me")), [Context("x")], 1, journal, Path("lamp.txt/cache"))
    assert len(sets) == 1 and "going on without" in journal.notes[0]


def test_bugs_are_not_hidden(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("selfparam.inject"), "train", failing(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("inject", model, "lamp.txt", *OWN, "--out", "out", *QUICK)


# --- the steps ------------------------------------------------------------------------------------------------------


def a_set(name: str, pairs: int = 2) -> TargetSet:
    x = Context(f"Text of {name}.", name, f"folder/{name}.txt")
    return TargetSet(x, tuple(Sentence(f"What is {name} {i}?", f"answer {i}", x.id) for i in range(pairs)))


def test_long_contexts_are_split_and_told() -> None:
    lm, journal = tiny_lm(), Journal(machine=True)
    text = " ".join(f"Sentence number {i} is here." for i in range(200))
    pieces = steps.fit([Context(text, "many"), Context("short")], [lm], journal)
    assert len(pieces) > 2
    assert all(len(lm.encode(piece.text)) < lm.window - 300 for piece in pieces)
    [note] = journal.notes
    assert note == f"'many' is longer than the window of 1024 tokens allows: split into {len(pieces) - 1} contexts"


def test_without_a_terminal_long_steps_print_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                                                   ) -> None:
    for every, machine, lines in ((60.0, False, 0), (0.0, True, 0), (0.0, False, 3)):
        monkeypatch.setattr(report, "EVERY", every)
        with Journal(machine).step("reading") as bar:
            bar(1, 4)
            bar.says("reading [b]on[/b]")
            bar(2, 4)
        found = capsys.readouterr().err.splitlines()
        assert len(found) == lines
    assert found[0].startswith("reading 1/4 after 0:00:0") and found[2].startswith("reading [b]on[/b] 2/4 after")


def test_what_takes_unequally_long_says_no_time_left(monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "EVERY", 0.0)
    for alike in (True, False):
        with Journal().step("reading", alike) as bar:
            for done in (1, 2, 3):
                time.sleep(0.01)
                bar(done, 400)
        assert ("left" in capsys.readouterr().err) == alike


def test_recipes_go_by_size() -> None:
    lm = tiny_lm()
    assert steps.choose_recipe(lm, "auto") == SMALL
    assert steps.choose_recipe(lm, "paper", retention=0.1) == PAPER.but(retention=0.1, known=100)
    assert steps.choose_recipe(lm, "paper", retention=0.1, sequence=True) == PAPER.but(retention=0.1)
    assert steps.choose_recipe(lm, "paper", lr=None, epochs=3) == PAPER.but(epochs=3)


def test_questions_know_their_context(place: Path) -> None:
    sets = [a_set("lamp"), a_set("boat")]
    contexts = [one.context for one in sets]
    names = [contexts[1].id, "boat", "boat.txt", "folder/boat.txt", None]
    lines = [{"question": "Who?", "answers": ["I"]} | ({"context": n} if n else {}) for n in names]
    (place / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    questions = steps.read_questions("q.jsonl", contexts)
    assert [q.about for q in questions] == [contexts[1].id] * 4 + [None]
    assert steps.exam_of("", questions, sets).texts == ["Text of boat."] * 4 + [None]
    assert steps.read_questions("q.jsonl", contexts[1:])[-1].about == contexts[1].id
    (place / "q.jsonl").write_text('{"question": "Who?", "answers": []}')
    with pytest.raises(TargetError, match=r"q\.jsonl line 1"):
        steps.read_questions("q.jsonl", contexts)


def test_pairs_that_are_asked_afterwards_are_left_out() -> None:
    journal = Journal(machine=True)
    asked = [Question("what is the boat 1", ("x",))]
    kept, gone = steps.without_questions([a_set("lamp"), a_set("boat")], asked, journal)
    assert gone == 1
    assert [len(one.related) for one in kept] == [2, 1]
    assert kept[1].related[0].prompt == "What is boat 0?"


def test_scores_are_means_over_contexts() -> None:
    questions = [Question("a?", ("red",), "x"), Question("b?", ("blue",), "x"), Question("c?", ("green",), "y")]
    exam = steps.Exam("", questions, ["", "", None], ["red", "no", "no"], ["red", "blue", None], ["red", "blue", "no"])
    assert exam.scores() == {"questions": 3, "before": 0.25, "with_context": 1.0, "after": 0.5}
    assert [one["f1_with_context"] for one in exam.as_dict()["questions"]] == [1.0, 1.0, None]


def test_many_training_pairs_are_sampled() -> None:
    exam = steps.training_exam([a_set("lamp", 1), a_set("boat", 150)])
    assert exam.label == "100 of the 151 training pairs"
    assert len(exam.questions) == len(exam.texts) == 100
    assert {q.about for q in exam.questions} == {a_set("lamp").context.id, a_set("boat").context.id}
