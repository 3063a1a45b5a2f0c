"""What a run would do, without doing it: cells, memory, and the time that is to be expected.

Rough on purpose: contexts, sentences and tests of assumed sizes, six operations a parameter and token for training, two
for reading and writing. Where rows of a method exist, their seconds are used instead. Refuses to know weights' values.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from safetensors import SafetensorError, safe_open

from selfparam.experiments.rows import Row
from selfparam.experiments.spec import Cell, MethodSpec, ModelSpec, Table, cells_of
from selfparam.inject.trainable import multiplies_bf16
from selfparam.methods import Method, Training
from selfparam.methods.infllm import InfLLM
from selfparam.methods.memoryllm import MemoryLLM
from selfparam.targets.unrelated import RATIO
from selfparam.types import Recipe

CONTEXT_TOKENS, SENTENCE_TOKENS, QUESTIONS, PROMPT_TOKENS = 500, 30, 2.25, 60
REQUESTS, PER_PERSON = {"inspired": 250, "redial": 4_500}, 4  # about as many as the paper's targets; films
MLP_SHARE, OSF_SHARE, LORA_SHARE = 0.6, 0.5, 0.003  # of the parameters that are trained
REACHED = 0.4  # of a matrix product's speed, by training (docs/LOG.md)


def speed() -> float:
    """Operations a second (10¹²) that training would do here and now, with half a second of matrix products."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    a = torch.ones(side, side, device=device, dtype=kind)
    products, begin = -1, 0.0
    while products < 1 or time.perf_counter() - begin < 0.5:
        float((a @ a)[0, 0])  # waits for it
        products += 1
        begin = begin if products else time.perf_counter()  # the first one is not counted
    return REACHED * products * 2 * side**3 / (time.perf_counter() - begin) / 1e12


@dataclass(frozen=True)
class Planned:
    """One method on one model. memory_gb: weights of θ and θ', gradients, optimiser; None where the size is unknown.

    seconds: of all cells that are missing; measured: whether from rows of this method, or from assumed speed.
    failed: so many of the missing ones were tried and have an error in their row; they are tried again.
    """

    model: str
    method: str
    n: int
    cells: int
    missing: int
    memory_gb: float | None
    seconds: float | None
    measured: bool
    failed: int


def plan(table: Table, rows: Mapping[str, Row], tflops: float) -> list[Planned]:
    """A line for each model, size and method. tflops: operations a second (10¹²) that the machine really does."""
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells_of(table):
        groups.setdefault((cell.model.shown, cell.method.label, cell.n), []).append(cell)
    found = []
    for (model, label, n), cells in groups.items():
        have = [rows[c.id] for c in cells if c.id in rows and "error" not in rows[c.id]]
        failed = sum("error" in rows.get(c.id, {}) for c in cells)
        size = parameters(cells[0].model)
        missing = len(cells) - len(have)
        each = mean(sum(row["seconds"].values()) for row in have) if have else None
        if each is None and size:
            each = operations(table, cells[0].method, size, n) / (tflops * 1e12)
        found.append(Planned(model, label, n, len(cells), missing, memory(table, cells[0], size),
                             each * missing if each is not None else None, bool(have), failed))
    return found


def parameters(model: ModelSpec) -> float:
    """Parameters of a model: as the table says, or counted in the headers of its files; 0 where neither is possible."""
    if model.parameters:
        return model.parameters
    folder = Path(model.name)
    if model.name == "embedded":
        folder = Path(__file__).parent.parent / "embedded" / "model"
    total = 0
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            with safe_open(file, "np") as weights:
                for key in weights.keys():  # noqa: SIM118 (no mapping)
                    count = 1
                    for length in weights.get_slice(key).get_shape():
                        count *= length
                    total += count
        except (OSError, SafetensorError):
            return 0.0
    return float(total)


def recipe_of(method: MethodSpec) -> Recipe | None:
    """How the method trains, None where it does not."""
    made = method.make()
    return made.recipe if isinstance(made, Training) else None


def operations(table: Table, method: MethodSpec, size: float, n: int) -> float:
    """Operations of one cell: writing pairs is not counted; teacher, training and answering are."""
    made, recipe = method.make(), recipe_of(method)
    reading = 2 * size * asked(table, made, n)
    if recipe is None:
        return reading
    author = table.authors.get(method.author)
    pairs = n * (method.pairs or author.pairs) if author else 0
    unrelated = pairs * (0 if getattr(made, "on", "sentences") == "answers" else _ratio(made)) + n * recipe.rehearsal
    steps = n // table.per_step if table.protocol == "sequential" and not method.at_once else 1
    again = pairs * (steps - 1) / 2 if getattr(made, "keep", "nothing") == "pairs" else 0
    trained = pairs + again + recipe.unrelated_share * unrelated
    tokens = trained * SENTENCE_TOKENS or n * CONTEXT_TOKENS
    teacher = n * CONTEXT_TOKENS + (pairs + again + unrelated) * SENTENCE_TOKENS if method.role == "ours" else 0
    return reading + 6 * size * tokens * recipe.epochs + 2 * size * teacher


def _ratio(made: Method) -> float:
    """Unrelated sentences for each pair."""
    found = getattr(made, "ratio", None)
    return RATIO if found is None else float(found)


def asked(table: Table, made: Method, n: int) -> float:
    """Tokens of all questions of a cell, with what stands in front of them and the answers."""
    where = getattr(made, "context", "none")
    front = {"own": 1, "all": n}.get(where, getattr(made, "top", 0)) * CONTEXT_TOKENS
    once = n * CONTEXT_TOKENS if isinstance(made, InfLLM | MemoryLLM) else 0
    if table.protocol == "recommend":
        requests = int(table.data.get("requests") or REQUESTS.get(str(table.data.get("kind")), PER_PERSON * n))
        return once + requests * (CONTEXT_TOKENS + front + table.recommend.tokens)
    times = len(table.ask_at) or n // table.per_step if table.protocol == "sequential" else 1
    return once + times * n * QUESTIONS * (PROMPT_TOKENS + front)


def memory(table: Table, cell: Cell, size: float) -> float | None:
    """GB: the weights, and for a method that trains: the new weights, gradients and two moments of what is trained.

    In a sequence of several steps also the weights of the step before; a checkpoint of MemoryLLM's is another model.
    """
    if not size:
        return None
    method, made = cell.method, cell.method.make()
    each = 2 if cell.model.dtype == "bfloat16" else 4
    recipe = recipe_of(method)
    if recipe is None:
        other = getattr(made, "checkpoint", "")
        return (size + (parameters(ModelSpec(other)) or size if other else 0)) * each / 1e9
    share = {"lora": LORA_SHARE, "mlp": MLP_SHARE, "full": 1.0, "osf": OSF_SHARE}[recipe.train]
    steps = table.protocol == "sequential" and not method.at_once and cell.n > table.per_step
    return size * each * ((3 if steps else 2) + 3 * share) / 1e9
