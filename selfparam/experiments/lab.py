"""What all cells of one model share in a process: θ, the data, and what is asked beside the contexts' own questions.

Refuses to know methods and rows. Source: arXiv 2410.00487, section 4; the probes (leak, fresh, world, drift) are ours:
F1 alone hides what a method costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from selfparam.data import worlds
from selfparam.data.benchmarks import BENCHMARKS
from selfparam.data.items import Benchmark
from selfparam.errors import TableError
from selfparam.experiments.spec import ModelSpec, Table
from selfparam.lm import LM
from selfparam.methods.readers import ANSWER_TOKENS
from selfparam.metrics.drift import Reference, drift, reference
from selfparam.metrics.qa_f1 import qa_f1
from selfparam.targets.authors import fingerprint
from selfparam.targets.unrelated import packaged
from selfparam.types import Question, Sentence

#: Options of data that are files, named relative to the table's folder.
FILES = ("path", "test", "entities", "items")


@dataclass
class Lab:
    """θ and its data. base: what the probes say about θ itself."""

    lm: LM
    bench: Benchmark
    fresh: tuple[tuple[str, Question], ...]
    world: tuple[Question, ...]
    before: Reference
    base: dict[str, float | None]
    model_hash: str

    def probe(self, lm: LM) -> dict[str, float | None]:
        """fresh, world (F1; None without questions), kl (nats per token) of the weights that a method answers with."""
        return dict(self.base) if lm is self.lm else self._measured(lm)

    def _measured(self, lm: LM) -> dict[str, float | None]:
        fresh = f1(lm, [q for _, q in self.fresh], [text for text, _ in self.fresh])
        kl = drift(self.before, lm) if self.before.rows else None
        return {"fresh": fresh, "world": f1(lm, self.world), "kl": kl}


def f1(lm: LM, questions: Sequence[Question], contexts: Sequence[str] | None = None) -> float | None:
    """Mean QA-F1 of the model's answers, None without questions."""
    if not questions:
        return None
    given = lm.answer([q.text for q in questions], contexts, max_new_tokens=ANSWER_TOKENS)
    return mean(qa_f1(answer, q.answers) for answer, q in zip(given, questions, strict=True))


def open_lab(table: Table, model: ModelSpec, says: Callable[[str], None] = lambda text: None) -> Lab:
    """Load the model and the data, and take the probes of θ. Raises ModelError, ContextError, TableError."""
    says(f"loading {model.shown}")
    lm = LM.load(model.name, dtype=model.dtype, device=model.device)
    bench = benchmark(table, lambda text: len(lm.encode(text)))
    says("measuring the model as it is")
    passages = packaged("held-out")[: table.probes.passages]
    lab = Lab(
        lm, bench, tuple((item.context.text, item.questions[0]) for item in bench.fresh),
        worlds.known_questions(table.probes.world) if table.probes.world else (),
        reference(lm, [Sentence("", text) for text in passages]), {}, fingerprint(lm),
    )
    lab.base = lab._measured(lm)
    return lab


def benchmark(table: Table, count: Callable[[str], int]) -> Benchmark:
    """The data of the table, with at most `table.questions` questions for each context. count: tokens of a text."""
    options: dict[str, Any] = dict(table.data)
    kind = options.pop("kind")
    options |= {key: str(Path(table.folder) / str(options[key])) for key in FILES if key in options}
    found = BENCHMARKS[kind](table.needed, table.probes.fresh, count, **options)
    if (found.test is not None) != (table.protocol == "recommend"):
        raise TableError(f"data of the kind '{kind}' is not for the protocol {table.protocol}: conversations (films, "
                         "inspired, redial) are for recommend, and recommend is for them")
    if not table.questions:
        return found
    most = table.questions
    items = tuple(replace(i, questions=i.questions[:most], elsewhere=i.elsewhere[:most]) for i in found.items)
    return replace(found, items=items)
