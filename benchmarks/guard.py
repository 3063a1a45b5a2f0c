"""How often the guard refuses: harmful updates (it should) and normal ones (it should not), on the embedded model.

    python benchmarks/guard.py --out results/guard.json            # 30 of each kind; an hour or two on one core
    python benchmarks/guard.py --number 3 --out /tmp/guard.json    # a first look
    python benchmarks/guard.py --kinds normal --out …              # only these; the others in the file stay

Normal: a fictional document, pairs by the model itself, the recipe for small models; each on top of the one before
where it passed, with questions about the earlier ones as probes. Harmful: the same with a learning rate x 100, and
documents of random characters, each on top of the first snapshot. Writes every update's measurements, so that limits
can be chosen anew without running again. Refuses to choose limits. Source: the promise of selfparam/store/guard.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import string
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from selfparam.cli import main
from selfparam.data.files import write_text
from selfparam.data.worlds import held_out
from selfparam.store.snapshots import Store
from selfparam.types import SMALL

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "


def call(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def update(store: Path, text: str, folder: Path, *options: str) -> dict[str, Any]:
    """One injection: whether it was refused, why, and what was measured."""
    (folder / "document.txt").write_text(text)
    begin = time.perf_counter()
    code, out, err = call("inject", str(store), str(folder / "document.txt"), "--json", "--restart", *options)
    guard = json.loads(out)["guard"] if out.strip().startswith("{") else {}
    return {"refused": code != 0, "why": err.strip()[-300:].replace(f"{folder}/", ""),
            "measured": guard.get("measured"), "seconds": round(time.perf_counter() - begin, 1)}


def normal(store: Path, number: int, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    for item in held_out(number, seed):
        yield update(store, item.context.text, folder)


def harmful(store: Path, number: int, seed: int, folder: Path, random_text: bool) -> Iterator[dict[str, Any]]:
    """Each on top of the first snapshot."""
    rng, first = random.Random(seed), str(Store.open(store).head)
    options = () if random_text else ("--lr", str(100 * SMALL.lr))
    for item in held_out(number, seed + 1):
        assert call("checkout", str(store), first)[0] == 0
        text = "".join(rng.choices(CHARACTERS, k=600)) if random_text else item.context.text
        yield update(store, text, folder, *options)


#: Each kind of update, made in a store of its own.
KINDS: dict[str, Callable[[Path, int, int, Path], Iterator[dict[str, Any]]]] = {
    "normal": normal,
    "learning rate x 100": partial(harmful, random_text=False),
    "random characters": partial(harmful, random_text=True),
}


def run(kinds: list[str], number: int, seed: int, out: Path) -> dict[str, list[dict[str, Any]]]:
    """The updates of these kinds, written to `out` after each; kinds that the file has beside them stay."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    if out.exists():
        found |= json.loads(out.read_text("utf-8"))["updates"]
    for kind in kinds:
        found[kind] = []
        with tempfile.TemporaryDirectory() as name:
            store = Path(name) / "store"
            assert call("init", str(store), "--model", "embedded", "--keep-texts")[0] == 0
            for one in KINDS[kind](store, number, seed, Path(name)):
                found[kind].append(one)
                print(kind, len(found[kind]), one, flush=True)
                write_text(out, json.dumps({"rates": rates(found), "updates": found}, indent=1) + "\n")
    return found


def rates(updates: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    return {kind: f"{sum(one['refused'] for one in each)} of {len(each)} refused" for kind, each in updates.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--number", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    print(json.dumps(rates(run(given.kinds, given.number, given.seed, given.out)), indent=1))
