"""What a run would do, without doing it: cells, memory, and the time that is to be expected.

Rough on purpose: contexts and sentences of assumed lengths, six operations a parameter and token for training, two for
reading. Where rows of a method exist, their seconds are used instead. Refuses to know weights' values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from safetensors import SafetensorError, safe_open

from selfparam.experiments.rows import Row
from selfparam.experiments.spec import Cell, MethodSpec, ModelSpec, Table, cells_of
from selfparam.methods import Training
from selfparam.types import Recipe

CONTEXT_TOKENS, SENTENCE_TOKENS, QUESTIONS, PROMPT_TOKENS = 500, 30, 2.25, 60
MLP_SHARE, OSF_SHARE, LORA_SHARE = 0.6, 0.5, 0.003  # of the parameters that are trained


@dataclass(frozen=True)
class Planned:
    """One method on one model. memory_gb: weights of θ and θ', gradients, optimiser; None where the size is unknown.

    seconds: of all cells that are missing; measured: whether from rows of this method, or from assumed speed.
    """

    model: str
    method: str
    n: int
    cells: int
    missing: int
    memory_gb: float | None
    seconds: float | None
    measured: bool


def plan(table: Table, rows: Mapping[str, Row], tflops: float) -> list[Planned]:
    """A line for each model, size and method. tflops: operations a second (10¹²) that the machine really does."""
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells_of(table):
        groups.setdefault((cell.model.shown, cell.method.label, cell.n), []).append(cell)
    found = []
    for (model, label, n), cells in groups.items():
        have = [rows[c.id] for c in cells if c.id in rows and "error" not in rows[c.id]]
        size = parameters(cells[0].model)
        missing = len(cells) - len(have)
        each = mean(sum(row["seconds"].values()) for row in have) if have else None
        if each is None and size:
            each = operations(table, cells[0].method, size, n) / (tflops * 1e12)
        found.append(Planned(model, label, n, len(cells), missing, memory(cells[0].model, cells[0].method, size),
                             each * missing if each is not None else None, bool(have)))
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
    """Operations of one cell: writing is not counted; teacher, training and answering are."""
    recipe = recipe_of(method)
    asked = n * QUESTIONS * (PROMPT_TOKENS + (0 if method.role == "ours" else CONTEXT_TOKENS))
    asked *= n if table.protocol == "sequential" else 1
    reading = 2 * size * asked
    if recipe is None:
        return reading
    pairs = max([table.authors[method.author].pairs] if method.author else [0])
    sentences = n * ((method.pairs or pairs) * 2 + recipe.rehearsal)
    tokens = sentences * SENTENCE_TOKENS or n * CONTEXT_TOKENS
    teacher = n * CONTEXT_TOKENS + tokens
    return reading + 6 * size * tokens * recipe.epochs + 2 * size * teacher


def memory(model: ModelSpec, method: MethodSpec, size: float) -> float | None:
    """GB: the weights, and for a method that trains: the new weights, gradients and two moments of what is trained."""
    if not size:
        return None
    each = 2 if model.dtype == "bfloat16" else 4
    recipe = recipe_of(method)
    if recipe is None:
        return size * each / 1e9
    share = {"lora": LORA_SHARE, "mlp": MLP_SHARE, "full": 1.0, "osf": OSF_SHARE}[recipe.train]
    copies = 3 if method.options.get("teacher") == "first" else 2
    return size * each * (copies + 3 * share) / 1e9
