"""How long scoring all REDIAL rows takes, and how much faster than a loop over titles that is; both in one run.

    python benchmarks/recall_speed.py [--convrec ../shared/data/convrec] [--titles 12000] [--sample 100]

Nobody released outputs for REDIAL, so 20 titles a row are drawn from a pool (popular ones more often): names of films
as they are, with a genre behind them, cut short, or two joined. The loop is the released program's: for each title
the least of its distances to all names, with the same C++ distance (rapidfuzz), one pair at a time; it is timed on a
sample of the titles and compared with the batch on that sample. Times are CPU seconds of all threads and wall seconds.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from selfparam.data.conversations import read_entities, read_items, read_requests
from selfparam.metrics.recall import entity_name, nearest, recall, rows_of, shares


def pool(names: list[str], size: int, rng: random.Random) -> list[str]:
    """Distinct titles as models write them."""
    found: dict[str, None] = {}
    while len(found) < size:
        name = rng.choice(names)
        forms = (name, f"{name} - Comedy, Drama", name[: max(3, len(name) * 2 // 3)], f"{name} and {rng.choice(names)}")
        found[rng.choice(forms)] = None
    return list(found)


def timed(label: str, wall: float, cpu: float) -> tuple[float, float]:
    """Print and return the wall and CPU seconds since then."""
    spent = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{label}: {spent[0]:.2f} s wall, {spent[1]:.2f} s CPU")
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convrec", type=Path, default=Path("../shared/data/convrec"))
    parser.add_argument("--titles", type=int, default=12_000)
    parser.add_argument("--sample", type=int, default=100)
    options = parser.parse_args()
    folder = options.convrec / "redial"
    if not folder.is_dir():
        raise SystemExit(f"no folder {folder}: name the one with the REDIAL files by --convrec")
    entities = read_entities(folder / "entity2id.json.gz")
    names = {i: entity_name(key) for i, key in entities.items()}
    requests = read_requests(folder / "test.jsonl.gz", entities)
    rng = random.Random(0)
    titles = pool(sorted({names[i] for i in read_items(folder / "item_ids.json")}), options.titles, rng)
    weights = [1 / (1 + i) ** 0.5 for i in range(len(titles))]
    texts = ["\n".join(f"{n}. {t}" for n, t in enumerate(rng.choices(titles, weights, k=20), 1)) for _ in requests]
    print(f"{len(requests)} rows, {20 * len(requests)} titles, {options.titles} distinct at most, {len(names)} names")

    wall, cpu = time.perf_counter(), time.process_time()
    rows = rows_of(texts, [[names[i] for i in r.targets] for r in requests],
                   [[names[i] for i in r.seen] for r in requests], names.values())
    timed("parse and match", wall, cpu)
    recall(rows)
    shares(texts, rows)
    timed("parse, match and count with bounds", wall, cpu)

    sample = rng.sample(titles, options.sample)
    wall, cpu = time.perf_counter(), time.process_time()
    batch = nearest(sample, names.values())
    fast = timed(f"{options.sample} titles, batch", wall, cpu)
    lower = [name.lower() for name in set(names.values())]
    wall, cpu = time.perf_counter(), time.process_time()
    loop = [min(Levenshtein.distance(title.lower(), name) for name in lower) for title in sample]
    slow = timed(f"{options.sample} titles, loop", wall, cpu)
    assert loop == [batch[title].distance for title in sample]
    print(f"ratio: {slow[0] / fast[0]:.0f} in wall time, {slow[1] / fast[1]:.0f} in CPU time; the loop over all titles "
          f"would take {slow[1] / options.sample * 20 * len(requests):.0f} s CPU")


if __name__ == "__main__":
    main()
