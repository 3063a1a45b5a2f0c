"""docs/performance.md and its figures from the JSON that the benchmarks wrote.

    python -m benchmarks.render

Writes what has been measured and names what has not. Refuses to measure. Source: none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.injection import table

HEAD = """# Speed and memory

Rendered by `python -m benchmarks.render` from `benchmarks/results/`; measured by `make bench`. Ratios are what is
compared; absolute speeds are those of one machine. What each way is: `benchmarks/ways.py`. Utilisation: FLOPs that the
method needs over seconds, as a share of a measured matrix product's (`benchmarks/flops.py`).
"""


def injection(found: dict[str, Any]) -> str:
    m, first = found["machine"], found["rows"]["ours"]
    return (f"## Side by side\n\n{found['contexts']} contexts of {first['tokens_per_context']:.0f} tokens, "
            f"{first['sentences']} sentences, {found['epochs']} epochs, model '{found['model']}'; {m['device']} "
            f"({m['processor']}), {m['threads']} threads, torch {m['torch']}; ours in {m['ours']}, ceiling "
            f"{m['ceiling'] / 1e9:.0f} GFLOP/s. Seconds: median of {len(first['seconds'])}.\n\n{table(found)}\n")


def reach(found: dict[str, Any]) -> str:
    step, machine = found["tokens_a_step"], found["machine"]
    lines = [f"## To the same F1\n\n{found['contexts']} contexts, {machine['threads']} threads; the paper's recipe "
             f"written plainly (float32), with learning rate {found['lr']:g}, and `SMALL` (products in "
             f"{machine['ours']}), a run for each number of epochs. A step of the paper's recipe has about "
             f"{step['paper']} tokens, one of ours {step['ours']} (the paper does not say how many).\n\nThe paper "
             f"trains for 50 epochs; here its first {found['paper'][-1]['epochs']} were run. "
             "*sooner*: seconds to a point of the paper's recipe over our shortest run's with at least its F1.\n",
             "| recipe | epochs | seconds | F1 | ours, sooner |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| paper | {p['epochs']} | {p['seconds']:.1f} | {p['f1']:.3f} | {f'{n:.0f} times' if n else '-'} |"
              for p, n in zip(found["paper"], found["ratios"], strict=True)]
    lines += [f"| ours | {p['epochs']} | {p['seconds']:.1f} | {p['f1']:.3f} | |" for p in found["ours"]]
    return "\n".join([*lines, ""])


def growth(found: dict[str, Any]) -> str:
    lines = ["## Growth\n", f"Seconds of the teacher pass and of {found['epochs']} epoch(s) of training "
             "(`benchmarks/growth.py`).\n", "| over | sizes | teacher, s | training, s | exponents |",
             "| --- | --- | --- | --- | --- |"]
    for what, one in found["growth"].items():
        cells = [", ".join(f"{p[key]:{form}}" for p in one["points"])
                 for key, form in (("size", "d"), ("teacher", ".1f"), ("training", ".1f"))]
        slope = one["exponent"]
        lines.append(f"| {what} | {' | '.join(cells)} | {slope['teacher']:.2f}, {slope['training']:.2f} |")
    return "\n".join([*lines, ""])


def gpu(found: dict[str, Any]) -> str:
    lines = [f"## Shapes of 7-8B models, random weights\n\n{found['device']}, torch {found['torch']}.\n",
             "| shape | contexts | epochs | seconds a context | teacher, s | training, s | GB | utilisation of both |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for one in found["gpu"]:
        if "error" in one:
            lines.append(f"| {one['shape']} | {one['contexts']} | failed: {one['error'].replace('|', '/')} | | | | | |")
            continue
        lines.append(
            f"| {one['shape']} | {one['contexts']} | {one['epochs']} | {one['seconds_per_context']:.2f} | "
            f"{one['seconds_teacher']:.1f} | {one['seconds_training']:.1f} | {one['peak_gb']:.1f} | "
            f"{one['utilisation_teacher']:.0%}, {one['utilisation_training']:.0%} |")
    return "\n".join([*lines, ""])


OUT = "--out benchmarks/results/{}.json"
#: Of each file of numbers: its part of the page, the command that measures it, its figure.
PARTS = {
    "injection": (injection, "make bench", "performance.svg"),
    "injection100": (injection, f"python -m benchmarks.injection --contexts 100 --epochs 2 --only plain {OUT}", ""),
    "injection_float32": (injection, f"python -m benchmarks.injection --contexts 5 --epochs 4 --only plain {OUT}", ""),
    "reach": (reach, f"python -m benchmarks.reach {OUT}", ""),
    "growth": (growth, "make bench", "growth.svg"),
    "gpu": (gpu, f"python -m benchmarks.gpu --shapes llama-3-8b {OUT}", ""),
}


def figures(results: dict[str, Any], docs: Path) -> None:
    """performance.svg: seconds of each way; growth.svg: seconds over size on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "selfparam"  # the same bytes for the same numbers
    if "injection" in results:
        rows = results["injection"]["rows"]
        figure, axes = plt.subplots(figsize=(7, 0.4 * len(rows) + 1))
        axes.barh([*rows][::-1], [sorted(r["seconds"])[len(r["seconds"]) // 2] for r in rows.values()][::-1])
        axes.set_xlabel("seconds")
        figure.savefig(docs / "performance.svg", bbox_inches="tight", metadata={"Date": None})
    if "growth" in results:
        found = results["growth"]["growth"]
        figure, each = plt.subplots(1, len(found), figsize=(4 * len(found), 3), squeeze=False)
        for axes, (what, one) in zip(each[0], found.items(), strict=True):
            for phase in ("teacher", "training"):
                axes.loglog([p["size"] for p in one["points"]], [p[phase] for p in one["points"]], "o-", label=phase)
            axes.minorticks_off()
            axes.set_xticks([p["size"] for p in one["points"]], [str(p["size"]) for p in one["points"]])
            axes.set_xlabel({"length": "tokens of a context"}.get(what, what))
            axes.set_ylabel("seconds")
            axes.legend()
        figure.savefig(docs / "growth.svg", bbox_inches="tight", metadata={"Date": None})


def render(folder: Path, docs: Path) -> str:
    """Write the page and the figures; the page's text."""
    results = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*.json"))}
    docs.mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    for name, (part, command, figure) in PARTS.items():
        command = command.format(name)
        parts.append("\n".join([part(results[name]), *([f"![{name}]({figure})\n"] if figure else []), f"`{command}`\n"])
                     if name in results else f"*{name}: not measured yet: `{command}`*\n")
    figures(results, docs)
    text = "\n".join(parts)
    (docs / "performance.md").write_text(text, "utf-8")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    o = parser.parse_args(argv)
    print(render(o.results, o.docs))


if __name__ == "__main__":
    main()
