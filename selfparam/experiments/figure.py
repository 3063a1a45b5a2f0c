"""Figure 2: F1 on each context over the steps of a sequence, and the retention matrix. matplotlib is imported inside.

Refuses to know where numbers come from. Source: arXiv 2410.00487, section 4.3 and figure 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from selfparam.errors import OutputError, TableError
from selfparam.experiments.rows import Row
from selfparam.experiments.spec import Table, cells_of
from selfparam.experiments.summary import retention

COLUMNS = 4
EACH = 20  # contexts: of more, the curve of each would hide the others


def draw(table: Table, rows: Mapping[str, Row], path: str | Path) -> None:
    """Write the figure (.png, .svg, .pdf): curves above their matrix for each method, COLUMNS of them side by side.

    Raises TableError, OutputError.
    """
    if table.protocol != "sequential":
        raise TableError(f"the figure shows sequences, and '{table.name}' is {table.protocol}: leave out --figure")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TableError("the figure needs matplotlib: pip install 'selfparam[figures]'") from error
    panels = _panels(table, rows)
    if not panels:
        raise TableError(f"no rows of a sequence in '{table.results}': run the table first")
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 7 * lines), layout="constrained")
    axes = figure.subplots(2 * lines, columns, squeeze=False)
    for i in range(columns * lines - len(panels)):
        axes[-1, -1 - i].set_axis_off()
        axes[-2, -1 - i].set_axis_off()
    for i, (label, found) in enumerate(panels.items()):
        line, column = divmod(i, columns)
        _curves(axes[2 * line, column], label, found)
        image = _matrix(axes[2 * line + 1, column], found)
    figure.colorbar(image, ax=list(axes[1]), label="F1")
    legend: dict[str, Any] = {}
    for axis in axes[::2].flat:
        legend |= {str(line.get_label()): line for line in axis.get_lines()}
    figure.legend(list(legend.values()), list(legend), loc="outside upper center", ncols=len(legend))
    try:
        figure.savefig(path, dpi=80, metadata={"Date": None} if str(path).endswith(".svg") else None)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write the figure to '{path}' ({error}): give a .png, .svg or .pdf") from error


def _panels(table: Table, rows: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """Mean retention of every method (and model, where there are several) that has rows with steps in between."""
    found: dict[str, list[Row]] = {}
    for cell in cells_of(table):
        row = rows.get(cell.id)
        if row and "error" not in row and len(row["steps"]) > 2:
            label = cell.method.label if len(table.models) == 1 else f"{cell.model.shown}: {cell.method.label}"
            found.setdefault(label, []).append(row)
    return {label: retention(own) for label, own in found.items()}


def _curves(axis: Any, label: str, found: dict[str, Any]) -> None:
    steps, matrix = found["steps"], found["matrix"]
    if matrix.shape[1] <= EACH:
        axis.plot(steps, matrix, color="tab:blue", alpha=0.25, linewidth=0.8, label="each context")
    axis.plot(steps, matrix.mean(axis=1), color="tab:blue", linewidth=2, label="mean of all contexts")
    so_far = [(s, matrix[k, :s].mean()) for k, s in enumerate(steps) if s]
    axis.plot(*zip(*so_far, strict=True), color="tab:orange", linewidth=2, label="mean of those injected so far")
    if found["base"] is not None:
        axis.axhline(found["base"], color="black", linestyle="--", linewidth=1, label="base")
    axis.set(title=fill(f"{label} (n = {found['sequences']})", 36), xlabel="injections", ylabel="F1", ylim=(0, 1))


def _matrix(axis: Any, found: dict[str, Any]) -> Any:
    """Retention: context (row) after how many injections (column)."""
    matrix = np.asarray(found["matrix"]).T
    image = axis.imshow(matrix, vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="nearest",
                        extent=(-0.5, matrix.shape[1] - 0.5, 0.5, len(matrix) + 0.5))
    axis.set(xlabel="injections", ylabel="context")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xticks(range(len(found["steps"])), [str(s) for s in found["steps"]], fontsize="x-small")
    return image
