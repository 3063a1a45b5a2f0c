"""Nothing is ever lost: SIGKILL, Ctrl-C, a full disk, a read-only folder and two writers at once.

After each the store is sound, its head is the old or the new snapshot, and what was interrupted can be finished with
the very bits of an undisturbed run. SELFPARAM_CRASHES=150 for the full number of kills (of inject; a third of it of
each other command); the default is a sample. Moments are drawn anew each time; SELFPARAM_SEED repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from selfparam.store.snapshots import Store
from tests.tiny import tiny_lm

if sys.platform != "linux":
    pytest.skip("forks, kills and mounts as Linux does", allow_module_level=True)

CRASHES = int(os.environ.get("SELFPARAM_CRASHES", "8"))
SEED = int(os.environ.get("SELFPARAM_SEED", str(time.time_ns() % 10_000)))
ROOT = Path(__file__).resolve().parent.parent
PAIRS = [("Who keeps the red lamp?", "Mara"), ("When was the light built?", "1911"), ("Where is it?", "on the hill")]
INJECT = ["lamp.txt", "--author", "pairs.jsonl", "--unrelated", "packaged", "--epochs", "2", "--lr", "1e-2",
          "--checkpoint-every", "0"]


class Server:
    """Runs command lines in forks of one warm process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder.with_name(folder.name + ".log")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                       "XDG_CACHE_HOME": str(folder / "cache")}
        self.process = subprocess.Popen([sys.executable, "-m", "tests.crash_server"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def run(self, *arguments: str, send: int = 0, after: float = 0.0, **order: Any) -> int:
        """Exit code, or minus the signal. send, after: a signal and the seconds before it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        order |= {"arguments": arguments, "cwd": str(self.folder), "log": str(self.log)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pid = json.loads(self.process.stdout.readline())["pid"]
        if send:
            time.sleep(after)
            with suppress(ProcessLookupError):
                os.kill(pid, send)
        return int(json.loads(self.process.stdout.readline())["status"])

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error: ")]

    def touches(self, *arguments: str, watch: Path) -> int:
        """How often an undisturbed run touches files below a folder."""
        assert self.run(*arguments, watch=str(watch)) == 0, self.said
        return int(self.log.with_name(self.log.name + ".events").read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("crash")
    tiny_lm("llama", chat=True).save(folder / "tiny")
    (folder / "lamp.txt").write_text("The red lamp stands on the hill. Its keeper is Mara, it was built in 1911.")
    (folder / "boat.txt").write_text("The grey boat belongs to Tom.")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in PAIRS))
    made = Server(folder)
    assert made.run("init", "empty", "--model", "tiny", "--max-surprise", "100") == 0, made.said
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait()


@pytest.fixture(scope="module")
def taught(server: Server) -> str:
    """The hash of the weights after an undisturbed injection into a copy of the empty store, which stays as `full`."""
    fresh(server, "empty", "full")
    assert server.run("inject", "full", *INJECT) == 0, server.said
    return weights(server.folder / "full")


def fresh(server: Server, template: str, name: str) -> Path:
    path = server.folder / name
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(server.folder / template, path, symlinks=True)
    return path


def weights(path: Path) -> str:
    return Store.open(path).find().files["model.safetensors"][0]


def moments(total: int, number: int) -> list[int]:
    """`number` of the touches 1 … total: one in each equal part, at random."""
    rng = random.Random(SEED)
    edges = [round(i * total / number) for i in range(number + 1)]
    return [rng.randint(a + 1, b) for a, b in pairwise(edges) if b > a]


def finish(server: Server, path: Path, taught: str) -> None:
    """Whatever has happened: sound now, the head old or new; continued or repeated, it ends in the same bits."""
    store = Store.open(path)
    assert store.verify() == []
    old, new = store.lineage()[0].id, store.head
    assert new == old or weights(path) == taught
    if (store.unfinished / "job.json").exists():
        assert server.run("inject", path.name, "--resume") == 0, server.said
    elif new == old:
        assert server.run("inject", path.name, *INJECT, "--restart") == 0, server.said
    assert weights(path) == taught
    assert store.verify() == []
    assert len(store.ids()) == len(store.lineage()) == 2
    assert server.run("gc", path.name) == 0
    assert os.listdir(path / "work") == []


# --- killed ---------------------------------------------------------------------------------------------------------


def test_inject_killed_at_any_touch_of_the_store(server: Server, taught: str) -> None:
    total = server.touches("inject", "counted", *INJECT, watch=fresh(server, "empty", "counted"))
    assert total > 50
    for moment in moments(total - 5, CRASHES):  # the number varies by a few with the temporary names
        path = fresh(server, "empty", "one")
        status = server.run("inject", "one", *INJECT, watch=str(path), kill_at=moment)
        assert status == -signal.SIGKILL, f"touch {moment} of {total}: {server.said} (SELFPARAM_SEED={SEED})"
        finish(server, path, taught)


def test_inject_killed_at_any_time(server: Server, taught: str) -> None:
    fresh(server, "empty", "timed")
    begin = time.monotonic()
    assert server.run("inject", "timed", *INJECT) == 0
    seconds = time.monotonic() - begin
    rng = random.Random(SEED)
    for _ in range(max(2, CRASHES // 3)):
        path = fresh(server, "empty", "one")
        server.run("inject", "one", *INJECT, send=signal.SIGKILL, after=rng.random() * seconds)
        finish(server, path, taught)


def test_killed_again_and_again(server: Server, taught: str) -> None:
    """Continuing is interrupted too: every run gets a few touches further."""
    path = fresh(server, "empty", "one")
    rng = random.Random(SEED)
    server.run("inject", "one", *INJECT, watch=str(path), kill_at=rng.randint(60, 90))
    for _ in range(3):
        if (path / "work" / "injection" / "job.json").exists():
            server.run("inject", "one", "--resume", "--checkpoint-every", "0", watch=str(path),
                       kill_at=rng.randint(30, 120))
            assert Store.open(path).verify() == []
    finish(server, path, taught)


@pytest.mark.parametrize(
    "command",
    ["rollback one", "checkout one FIRST", "gc one", "gc one --all", "gc one --deltas", "verify one", "log one --all",
     "diff one FIRST", "export one --out out", "export one --out out --format adapter", "ask one Who?"],
)
def test_other_commands_killed(server: Server, taught: str, command: str) -> None:
    template = server.folder / "full"
    first = Store.open(template).lineage()[0].id
    arguments = command.replace("FIRST", first[:8]).split()
    shutil.rmtree(server.folder / "out", ignore_errors=True)
    path = fresh(server, "full", "one")
    (path / "work" / "tmp-left").mkdir()
    watched = server.folder if "export" in command else path
    total = server.touches(*arguments, watch=watched)
    after = Store.open(path).head
    for moment in moments(total - 2, max(2, CRASHES // 3)):
        shutil.rmtree(server.folder / "out", ignore_errors=True)
        path = fresh(server, "full", "one")
        head = Store.open(path).head
        assert server.run(*arguments, watch=str(watched), kill_at=moment) in (-signal.SIGKILL, 0)
        store = Store.open(path)
        assert store.verify() == []
        assert store.head in (head, after)
        assert len(store.ids()) == 2
        if (server.folder / "out").exists():
            assert server.run("ask", "out", "Who?") == 0 or "adapter" in command
            shutil.rmtree(server.folder / "out")
        if store.head == head:
            assert server.run(*arguments) == 0, server.said
        assert Store.open(path).head == after
        shutil.rmtree(server.folder / "out", ignore_errors=True)
        assert server.run("export", "one", Store.open(path).ids()[0], "--out", "out") == 0, server.said
    for left in server.folder.glob(".out.*.tmp"):
        shutil.rmtree(left)


def test_init_killed(server: Server) -> None:
    for path in server.folder.glob(".new.*.tmp"):
        shutil.rmtree(path)
    total = server.touches("init", "new", "--model", "tiny", watch=server.folder)
    for moment in moments(total - 2, max(2, CRASHES // 3)):
        shutil.rmtree(server.folder / "new", ignore_errors=True)
        assert server.run("init", "new", "--model", "tiny", watch=str(server.folder), kill_at=moment) == -signal.SIGKILL
        if not (server.folder / "new").exists():
            assert server.run("init", "new", "--model", "tiny") == 0, server.said
        assert Store.open(server.folder / "new").verify() == []


@pytest.mark.parametrize("touch, of", [("os.remove", "job.json"), ("shutil.rmtree", "")])
def test_killed_while_the_finished_job_is_dropped(server: Server, taught: str, touch: str, of: str) -> None:
    """The texts that are in it do not stay behind."""
    path = fresh(server, "empty", "one")
    at = (touch, str(path / "work" / "injection" / of))
    assert server.run("inject", "one", *INJECT, die_before=at) == -signal.SIGKILL
    assert Store.open(path).head != Store.open(path).lineage()[0].id
    assert (path / "work" / "injection" / "sets.jsonl").exists()
    finish(server, path, taught)

    beside, arguments = server.folder / ".late.injection", ("inject", "tiny", *INJECT, "--out", "late")
    assert server.run(*arguments, die_before=(touch, str(beside / of))) == -signal.SIGKILL
    written = (server.folder / "late" / "model.safetensors").read_bytes()
    assert (beside / "sets.jsonl").exists()
    for again in (arguments, (*arguments, "--restart")):
        assert server.run(*again) == 2
        assert "'late' exists and is not empty" in server.said
    if (beside / "job.json").exists():
        assert server.run("inject", "tiny", "--resume", "--out", "late") == 0, server.said
    assert not beside.exists()
    assert (server.folder / "late" / "model.safetensors").read_bytes() == written
    shutil.rmtree(server.folder / "late")


# --- stopped politely ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_continue(server: Server, taught: str, which: signal.Signals) -> None:
    path = fresh(server, "empty", "one")
    seen = threading.Event()

    def when_training() -> None:
        """The signal comes when the first checkpoint is there."""
        while not seen.is_set():
            if any((path / "work" / "injection").glob("step-*.json")):
                for pid in subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True,
                                          text=True).stdout.split():
                    os.kill(int(pid), which)
                return
            time.sleep(0.005)

    watcher = threading.Thread(target=when_training)
    watcher.start()
    status = server.run("inject", "one", *INJECT, "--epochs", "40")
    seen.set()
    watcher.join()
    assert status == 130, server.said
    assert "continue with  selfparam inject one --resume" in server.said
    assert len(server.said.strip().splitlines()) == 1
    assert server.run("inject", "one", *INJECT) == 2
    assert "an interrupted injection is waiting" in server.said
    assert server.run("inject", "one", "--resume", "--epochs", "2") == 2
    assert "leave out 'epochs'" in server.said
    assert server.run("inject", "one", "--resume") == 0, server.said
    expected = fresh(server, "empty", "two")
    assert server.run("inject", "two", *INJECT, "--epochs", "40") == 0
    assert weights(path) == weights(expected) != taught


def test_a_model_directory_is_continued_too(server: Server) -> None:
    out = server.folder / "dir"
    arguments = ("inject", "tiny", *INJECT, "--out", "dir")
    beside = server.folder / ".dir.injection"
    total = server.touches(*arguments, watch=beside)
    expected = (out / "model.safetensors").read_bytes()
    assert not beside.exists()
    for moment in moments(total, 3)[1:]:
        shutil.rmtree(out, ignore_errors=True)
        server.run(*arguments, watch=str(beside), kill_at=moment)
        if (beside / "job.json").exists():
            assert server.run("inject", "tiny", "--resume", "--out", "dir") == 0, server.said
        else:
            server.run(*arguments)  # begins, unless the model is there
        assert (out / "model.safetensors").read_bytes() == expected
        assert not beside.exists()


# --- no room, no rights, two at once --------------------------------------------------------------------------------


def test_files_that_may_not_grow(server: Server, taught: str) -> None:
    for size in (2_000, 5_000, 60_000):
        path = fresh(server, "empty", "one")
        head = Store.open(path).head
        assert server.run("inject", "one", *INJECT, fsize=size) == 2, server.said
        assert len(server.errors) == 1 and "Traceback" not in server.said
        assert Store.open(path).verify() == [] and Store.open(path).head == head
        finish(server, path, taught)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_or_read_only(server: Server, taught: str, mounted: Path) -> None:
    store = mounted / "one"
    shutil.copytree(server.folder / "full", store, symlinks=True)
    head, shown = Store.open(store).head, str(store)
    more = ("boat.txt", *INJECT[1:])
    for free in (0, 40_000, 150_000, 300_000):
        free_now = shutil.disk_usage(mounted).free
        (mounted / "filler").write_bytes(b"x" * max(0, free_now - free))
        assert server.run("inject", shown, *more, "--restart") == 2, server.said
        assert len(server.errors) == 1 and "Traceback" not in server.said
        assert server.run("rollback", shown) in (0, 2)
        (mounted / "filler").unlink()
        assert Store.open(store).verify() == []
        assert server.run("checkout", shown, str(head)) == 0, server.said
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    for arguments in (["inject", shown, *more], ["rollback", shown], ["gc", shown], ["init", f"{shown}2", "--model",
                                                                                     "tiny"]):
        assert server.run(*arguments) == 2
        assert len(server.errors) == 1 and "Read-only" in server.said
    for arguments in (["verify", shown], ["log", shown], ["ask", shown, "Who?"], ["export", shown, "--out", "saved"]):
        assert server.run(*arguments) == 0, server.said
    subprocess.run(["mount", "-o", "remount,rw", str(mounted)], check=True)
    assert server.run("inject", shown, *more, "--restart") == 0, server.said
    assert len(Store.open(store).lineage()) == 3


def test_two_writers_at_once(server: Server, taught: str) -> None:
    path = fresh(server, "empty", "one")
    with Store.open(path).writing():
        for arguments in (["inject", "one", *INJECT], ["rollback", "one"], ["gc", "one"],
                          ["checkout", "one", Store.open(path).ids()[0]]):
            if arguments[0] == "rollback":
                continue  # nothing to roll back: refused before
            assert server.run(*arguments) == 2
            assert "another process is writing" in server.said
        assert server.run("log", "one") == server.run("verify", "one") == 0
    other = Server(server.folder)
    codes: list[int] = []
    both = [threading.Thread(target=lambda one=one: codes.append(one.run("inject", "one", *INJECT)))
            for one in (server, other)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert other.process.stdin is not None
    other.process.stdin.close()
    other.process.wait()
    store = Store.open(path)
    assert sorted(codes) in ([0, 0], [0, 2])
    assert len(store.lineage()) == len(store.ids()) == 1 + codes.count(0)
    assert store.verify() == []
