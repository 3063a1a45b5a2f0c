"""The rules of the house that no linter holds: the public names, what an import may do, what no file may contain."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import selfparam

ROOT = Path(__file__).resolve().parent.parent

FORBIDDEN = {
    "code from the hub, unasked": re.compile(r"trust_remote_code\s*=\s*True"),
    "pickle": re.compile(r"pickle\.loads?\(|torch\.load\("),
    "a path of one machine": re.compile(r"(?<![\w.<*/-])/(?:home|root|work|Users)/[\w.]|\b[A-Z]:\\+Users\\"),
}

# The libraries come first: what they look at while they are imported is not ours. Then sockets and questions about
# the GPU are reported if a module of ours causes them.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import accelerate, peft, torch, transformers, typer

wrong = []

def on_event(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        wrong.append(event)
        raise OSError("no network in this test")

def watched(name, ask):
    def asked(*args, **kwargs):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "selfparam":
            wrong.append(f"{caller} asks torch.cuda.{name}")
        return ask(*args, **kwargs)
    return asked

sys.addaudithook(on_event)
for name in ("is_available", "device_count", "current_device", "get_device_properties", "is_bf16_supported"):
    setattr(torch.cuda, name, watched(name, getattr(torch.cuda, name)))

import selfparam
for module in pkgutil.walk_packages(selfparam.__path__, "selfparam."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
print("\\n".join(wrong), end="")
"""


def files() -> list[Path]:
    """The files git tracks or would add: what a clone holds."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    return [ROOT / name for name in listed.split("\0") if (ROOT / name).is_file()]


def test_public_names() -> None:
    names = selfparam.__all__
    assert 0 < len(names) <= 21
    assert names == sorted(set(names))
    assert [name for name in names if not hasattr(selfparam, name)] == []


def test_importing_asks_neither_network_nor_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_EVERYTHING], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_contains(what: str) -> None:
    found = []
    for file in files():
        raw = file.read_bytes()
        if b"\0" in raw[:4096]:
            continue
        for number, line in enumerate(raw.decode(errors="replace").splitlines(), 1):
            if FORBIDDEN[what].search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("code from the hub, unasked", "trust_remote_code" + "=True"),
        ("pickle", "pickle" + ".load(file)"),
        ("pickle", "torch" + ".load(path)"),
        ("a path of one machine", "open('" + "/home" + "/ann/model')"),
        ("a path of one machine", "cd " + "/work" + "/main"),
        ("a path of one machine", "C:" + "\\Users\\ann"),
    ],
)
def test_the_search_finds(what: str, line: str) -> None:
    assert FORBIDDEN[what].search(line)
