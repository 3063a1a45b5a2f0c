"""How often the guard refuses: harmful updates (it should) and normal ones (it should not), on the embedded model.

    python benchmarks/guard.py --out results/guard.json            # 30 of each kind; some hours on two cores
    python benchmarks/guard.py --number 3 --out /tmp/guard.json    # a first look

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
from pathlib import Path
from typing import Any

from selfparam.cli import main
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
    return {"refused": code != 0, "why": err.strip()[-300:], "measured": guard.get("measured"),
            "seconds": round(time.perf_counter() - begin, 1)}


def run(number: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    rng = random.Random(seed)
    found: dict[str, list[dict[str, Any]]] = {"normal": [], "learning rate x 100": [], "random characters": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = folder / "store"
        assert call("init", str(store), "--model", "embedded", "--keep-texts")[0] == 0
        first = str(Store.open(store).head)
        for i, item in enumerate(held_out(number, seed)):
            found["normal"].append(update(store, item.context.text, folder))
            print("normal", i, found["normal"][-1], flush=True)
        for i, item in enumerate(held_out(number, seed + 1)):
            for kind, text, options in (
                ("learning rate x 100", item.context.text, ("--lr", str(100 * SMALL.lr))),
                ("random characters", "".join(rng.choices(CHARACTERS, k=600)), ()),
            ):
                assert call("checkout", str(store), first)[0] == 0
                found[kind].append(update(store, text, folder, *options))
                print(kind, i, found[kind][-1], flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    updates = run(given.number, given.seed)
    rates = {kind: f"{sum(one['refused'] for one in each)} of {len(each)} refused" for kind, each in updates.items()}
    print(json.dumps(rates, indent=1))
    given.out.write_text(json.dumps({"number": given.number, "seed": given.seed, "rates": rates, "updates": updates},
                                    indent=1) + "\n")
