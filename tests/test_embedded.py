"""The model that ships with the package, and the README's example. Thresholds are far below what the card reports."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

from selfparam.data import worlds
from selfparam.lm import LM
from selfparam.metrics.qa_f1 import qa_f1

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM.load("embedded")


def test_it_is_an_ordinary_directory_within_its_size(lm: LM) -> None:
    folder = ROOT / "selfparam" / "embedded" / "model"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 40e6
    assert lm.is_chat and lm.window == 1024
    assert not [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]


def test_it_reads_and_does_not_know_what_it_has_not_read(lm: LM) -> None:
    items = worlds.held_out(10, seed=7)
    asked = [(i.context.text, q) for i in items for q in i.questions]

    def f1(contexts: list[str] | None) -> float:
        given = lm.answer([q.text for _, q in asked], contexts)
        return mean(qa_f1(a, q.answers) for a, (_, q) in zip(given, asked, strict=True))

    assert f1([text for text, _ in asked]) > 0.5
    assert f1(None) < 0.25


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"selfparam/', f'"{ROOT}/selfparam/'), "README.md", "exec"), {})
    assert (tmp_path / "my-python-model" / "config.json").exists()
