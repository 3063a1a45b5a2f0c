"""Measure a model as a reader: F1 with and without the context, pairs it writes itself, prose, speed; writes its card.

    python pretraining/evaluate.py pretraining/run --run pretraining/run --card card.md --json card.json

Contexts are never cut: a question whose context does not fit the window is left out and counted. Nothing measured here
is in the corpus: new names, held-out wordings, scenes and articles, texts written for this purpose.
Refuses to know training and injection. Source: QA-F1 as in SELF-PARAM (arXiv 2410.00487, section 4).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import random
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import held_out_row, read_rows
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from selfparam.data import worlds
from selfparam.errors import OutputError, SelfParamError, TargetError
from selfparam.lm import LM, embedded_path
from selfparam.metrics.qa_f1 import mean_f1, qa_f1, tokens
from selfparam.targets import LocalAuthor, write_pairs
from selfparam.types import Context, Question, Sentence

NEW_TOKENS = 24
#: Real sets under --data: file, and whether only its held-out articles may be asked (the rest is in the corpus).
REAL = {
    "XQuAD (held-out articles)": ("xquad_en", True),
    "SQuAD-half (held-out articles)": ("squad2_dev_half_answerable", True),
    "PolicyQA (held-out sites)": ("policyqa_dev", True),
    "FairytaleQA (validation)": ("fairytaleqa_val", False),
    "MCTest": ("mctest_train_dev", False),
}
AS_WRITTEN = 0.8  # F1 from which a reader's answer counts as the written one
ABOUT = 0.5  # F1 of two questions' words (without the subject's name) from which they ask about the same thing
#: Options that are numbers: default and meaning.
SIZES = {
    "worlds": (50, "fictional contexts of each kind of wording"),
    "scenes": (40, "held-out scenes"),
    "real": (200, "questions of each real set"),
    "known": (200, "facts of the known world"),
    "authored": (40, "worlds, and as many scenes and real passages, to write pairs about"),
    "pairs": (10, "pairs asked for about each of them"),
    "rounds": (2, "times that the author is asked"),
    "paragraphs": (200, "paragraphs of WikiText-2"),
    "passages": (100, "packaged passages"),
    "seed": (0, "seed of every sample"),
}
NOTES = {
    "Answers": (
        "QA-F1 as in LongBench, [95 % interval]: mean per context, then over contexts; bootstrap over contexts. "
        '"Too long" counts questions that do not fit the window with their context: left out, nothing is cut. Known '
        "world: facts of pretraining asked without a context; there every question counts for itself."
    ),
    "Pairs written by the model itself": (
        'About new names, held-out scenes and held-out articles. "Read as written": with the text it answers with '
        f"F1 >= {AS_WRITTEN} to the written answer. Right and wrong by the generator's facts; shares of all pairs. "
        '"Checked": as the package writes pairs, kept only if it answers so when it reads again; without, all it wrote.'
    ),
    "Prose": (
        'Next-word loss on plain text that is not in the corpus. WikiText-2 as it is (<unk>, " @-@ "), no headings.'
    ),
}

Scored = dict[str, float]
Grid = tuple[str, list[str], list[list[str]]]  # title, header, rows


@dataclass(frozen=True)
class Item:
    """A question with its context and reference answers."""

    context: str
    question: str
    answers: tuple[str, ...]


# --- what is asked --------------------------------------------------------------------------------------------------


def items_of(found: Iterable[tuple[Context, Sequence[Question]]]) -> list[Item]:
    return [Item(context.text, q.text, q.answers) for context, questions in found for q in questions]


def free_items() -> list[Item]:
    lines = Path(__file__).with_name("freely_written.jsonl").read_text("utf-8").splitlines()
    return [Item(r["text"], q["question"], tuple(q["answers"])) for r in map(json.loads, lines) for q in r["questions"]]


def collect(data: Path, n_worlds: int, n_scenes: int, seed: int) -> dict[str, list[Item]]:
    """Everything that is asked with and without its context, by the name of the set."""
    known, held = worlds.held_out(n_worlds, seed), worlds.held_out(n_worlds, seed, "held-out")
    found = {
        "worlds, known wordings": items_of((w.context, w.questions) for w in known),
        "worlds, held-out wordings": items_of((w.context, w.questions) for w in held),
        "held-out scenes": items_of(worlds.held_out_passages(n_scenes, seed)),
        "freely written": free_items(),
    }
    for name, (file, held_out_only) in REAL.items():
        path = data / "qa" / f"{file}.jsonl.gz"
        if path.exists():
            rows = [r for r in read_rows(path) if not held_out_only or held_out_row(r)]
            found[name] = [Item(r["context"], r["question"].strip(), tuple(r["answers"])) for r in rows]
    return found


def fitting(lm: LM, items: Sequence[Item]) -> list[Item]:
    """The items whose prompt and answer fit the window."""
    room = {x: lm.window - NEW_TOKENS - len(lm.prefix(x)) for x in {item.context for item in items}}
    return [item for item in items if len(lm.question(item.question)) <= room[item.context]]


# --- F1 -------------------------------------------------------------------------------------------------------------


def scored(keys: Sequence[str], answers: Sequence[str], right: Sequence[Sequence[str]], seed: int) -> Scored:
    """Mean F1 over contexts (`keys` says which one an answer is about) and its 95 % bootstrap interval."""
    scores: dict[str, list[float]] = {}
    for key, answer, references in zip(keys, answers, right, strict=True):
        scores.setdefault(key, []).append(qa_f1(answer, references))
    means = np.array([sum(s) / len(s) for s in scores.values()])
    drawn = means[np.random.default_rng(seed).integers(0, len(means), (2000, len(means)))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"f1": mean_f1(scores), "low": float(low), "high": float(high)}


def ask(lm: LM, asked: Sequence[str], contexts: Sequence[str] | None, progress: Progress, name: str) -> list[str]:
    bar = progress.add_task(name, total=len(asked))
    return lm.answer(
        asked, contexts, max_new_tokens=NEW_TOKENS, progress=lambda at, _: progress.update(bar, completed=at)
    )


def reading(lm: LM, name: str, items: list[Item], real: int, seed: int, progress: Progress) -> dict[str, Any]:
    """F1 with and without the context, on at most `real` questions of a real set and on all of a set of our own."""
    fit = fitting(lm, items)
    chosen = random.Random(seed).sample(fit, min(real, len(fit))) if name in REAL else fit
    contexts, asked = [i.context for i in chosen], [i.question for i in chosen]
    row: dict[str, Any] = {
        "set": name,
        "questions": len(chosen),
        "of": len(items),
        "too_long": len(items) - len(fit),
        "contexts": len(set(contexts)),
    }
    if chosen:
        right = [i.answers for i in chosen]
        row["with"] = scored(contexts, ask(lm, asked, contexts, progress, name), right, seed)
        row["without"] = scored(contexts, ask(lm, asked, None, progress, f"{name}, no context"), right, seed)
    return row


def remembered(lm: LM, n: int, seed: int, progress: Progress) -> dict[str, Any]:
    """F1 on facts of the known world, asked without any context."""
    questions = worlds.known_questions(n, seed)
    asked = [q.text for q in questions]
    answers = ask(lm, asked, None, progress, "known world, no context")
    return {"questions": len(asked), **scored(asked, answers, [q.answers for q in questions], seed)}


# --- pairs that the model writes ------------------------------------------------------------------------------------


def plain(text: str) -> list[str]:
    return tokens(re.sub(r"['’]s\b", "", text))


def contained(answer: str, text: str) -> bool:
    """Do the answer's words stand in the text, next to each other?"""
    words = tokens(answer)
    return bool(words) and f" {' '.join(words)} " in f" {' '.join(tokens(text))} "


def wordings_of(item: worlds.WorldContext) -> list[tuple[str, str | None]]:
    """(question, answer) in every wording of the generator; None where the text does not state the relation."""
    domain = next(d for d in worlds.domains() if item.context.source == f"worlds/{d.name}")
    stated = {q.text: q.answers[0] for q in item.questions}
    found: list[tuple[str, str | None]] = [(s.prompt, s.completion) for s in item.pairs]
    for relation in domain.relations:
        asks = [worlds.capital(worlds.fill(a, s=item.context.title)) for a in relation.asks]
        answer = next((stated[a] for a in asks if a in stated), None)
        found += [(a, answer) for a in asks]
    return found


def judged(s: Sentence, item: worlds.WorldContext) -> str:
    """ "right", "wrong", or "no fact" where the question is like none of the generator's.

    Right: one of the most similar known questions has this answer, and the question names nothing new.
    """
    wordings, subject = wordings_of(item), set(plain(item.context.title))

    def without_name(question: str) -> str:
        return " ".join(w for w in plain(question) if w not in subject)

    likeness = [qa_f1(without_name(s.prompt), [without_name(q)]) for q, _ in wordings]
    if max(likeness) < ABOUT:
        return "no fact"
    answers = [a for (_, a), like in zip(wordings, likeness, strict=True) if a and like == max(likeness)]
    known = {w for text in (item.context.text, *(q for q, _ in wordings)) for w in plain(text)}
    names = [w for w in s.prompt.split()[1:] if w[0].isupper() or w[0].isdigit()]
    names_known = all(set(plain(w)) <= known for w in names)
    return "right" if names_known and any(qa_f1(s.completion, [a]) == 1 for a in answers) else "wrong"


def real_passages(lm: LM, sets: dict[str, list[Item]], n: int, seed: int) -> list[Context]:
    """Passages of the held-out articles that leave room for the request and the pairs."""
    texts = sorted({i.context for name in REAL if "articles" in name for i in sets.get(name, [])})
    fit = [text for text in texts if len(lm.encode(text)) <= lm.window // 2]
    return [Context(text) for text in random.Random(seed).sample(fit, min(n, len(fit)))]


def written(
    lm: LM, contexts: Sequence[Context], checked: bool, pairs: int, rounds: int, progress: Progress
) -> list[list[Sentence]]:
    """Pairs about each context, in one batch; halved where nothing was written about one, so that it gets []."""
    bar = progress.add_task(f"writing about {len(contexts)} contexts", total=None)
    author = LocalAuthor(
        lm, checked=checked, progress=lambda at, total: progress.update(bar, completed=at, total=total)
    )
    try:
        return [list(sentences) for sentences, _ in write_pairs(contexts, author, pairs=pairs, rounds=rounds)]
    except TargetError:
        if len(contexts) == 1:
            return [[]]
        half = len(contexts) // 2
        parts = (contexts[:half], contexts[half:])
        return [found for part in parts for found in written(lm, part, checked, pairs, rounds, progress)]


def self_written(
    lm: LM,
    contexts: Sequence[Context],
    checked: bool,
    facts_of: dict[str, worlds.WorldContext],
    o: argparse.Namespace,
    progress: Progress,
) -> dict[str, Any]:
    """How many pairs the model writes about each context, how good they are, and twenty of them drawn at random.

    checked: with those left out that it answers otherwise when it reads again, as users get them.
    facts_of: the generator's items by context id, where it knows the facts.
    """
    found = written(lm, contexts, checked, o.pairs, o.rounds, progress)
    each = [(s, x) for x, sentences in zip(contexts, found, strict=True) for s in sentences]
    row: dict[str, Any] = {
        "contexts": len(contexts),
        "requested": o.pairs * len(contexts),
        "pairs": len(each),
        "nothing_about": found.count([]),
        "samples": [],
    }
    if not each:
        return row
    answers = ask(lm, [s.prompt for s, _ in each], [x.text for _, x in each], progress, "reading its own pairs")
    shown = [
        {"context": x.title or x.text[:60], "question": s.prompt, "answer": s.completion, "read": a}
        for (s, x), a in zip(each, answers, strict=True)
    ]
    row["contained"] = sum(contained(s.completion, x.text) for s, x in each) / len(each)
    row["as_written"] = sum(qa_f1(p["read"], [p["answer"]]) >= AS_WRITTEN for p in shown) / len(each)
    verdicts = [judged(s, facts_of[x.id]) for s, x in each if x.id in facts_of]
    row |= {verdict: verdicts.count(verdict) / len(verdicts) for verdict in ("right", "wrong", "no fact") if verdicts}
    row["samples"] = random.Random(o.seed).sample(shown, min(20, len(shown)))
    return row


# --- prose, speed, size ---------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(lm: LM, texts: Sequence[str], progress: Progress, name: str, rows: int = 4) -> Scored:
    """Next-word loss on plain texts, each behind BOS; one longer than the window in pieces, each behind BOS."""
    head = lm.prefix(plain=True)
    longest = lm.window - len(head)
    pieces = [head + ids[at : at + longest] for ids in map(lm.encode, texts) for at in range(0, len(ids), longest)]
    pieces.sort(key=len)
    nats = 0.0
    for at in progress.track(range(0, len(pieces), rows), description=name):
        part = pieces[at : at + rows]
        width = max(map(len, part))
        ids = torch.tensor([r + [r[0]] * (width - len(r)) for r in part], device=lm.device)
        lengths = torch.tensor([len(r) for r in part], device=lm.device)
        mask = torch.arange(width, device=lm.device) < lengths[:, None]
        logits = lm.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits[:, len(head) - 1 : -1].transpose(1, 2), ids[:, len(head) :], reduction="none"
        )
        nats += float((losses * mask[:, len(head) :]).sum())
    count, size = sum(len(r) - len(head) for r in pieces), sum(len(text.encode()) for text in texts)
    bits = nats / math.log(2) / size
    return {"texts": len(texts), "tokens": count, "perplexity": math.exp(nats / count), "bits_per_byte": bits}


def prose(lm: LM, data: Path, paragraphs: int, passages: int, seed: int, progress: Progress) -> dict[str, Scored]:
    """WikiText-2 (its first paragraphs, without headings) and a sample of the packaged passages."""
    packaged = resources.files("selfparam.data").joinpath("passages.txt").read_text("utf-8").splitlines()
    chosen = random.Random(seed).sample(packaged, min(passages, len(packaged)))
    found = {"packaged passages": perplexity(lm, chosen, progress, "packaged passages")}
    path = data / "text" / "wikitext2_valid.txt.gz"
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts = [line.strip() for line in lines if line.strip() and not line.strip().startswith("=")]
        found["WikiText-2 valid"] = perplexity(lm, texts[:paragraphs], progress, "WikiText-2")
    return found


def speed(lm: LM, new: int = 96) -> Scored:
    """Generated tokens per second with a context in front, one row and 16 rows at a time."""
    prompt = [*lm.prefix(worlds.held_out(1)[0].context.text), *lm.question("What is it?")]
    found = {}
    for rows in (1, 16):
        ids = torch.tensor([prompt] * rows, device=lm.device)
        kept: dict[str, Any] = {"do_sample": False, "pad_token_id": lm.tokenizer.eos_token_id}
        for length in (2, new):  # the first to warm up
            started = time.perf_counter()
            lm.model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=length, max_new_tokens=length, **kept
            )
        found[f"rows_{rows}"] = rows * new / (time.perf_counter() - started)
    return found


def size_on_disk(folder: Path) -> int:
    """Bytes of what a user loads: weights, configuration, tokenizer (not a run's optimiser state and log)."""
    own = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja")]
    return sum(p.stat().st_size for p in own if not p.name.startswith(("optimizer-", "state")))


def training(run: Path) -> dict[str, Any]:
    """Steps, tokens and seconds of a run, and its curve. Raises OutputError when the folder holds no state."""
    if not (run / "state.json").exists():
        raise OutputError(f"no state.json in '{run}': give --run the folder that train.py wrote")
    curve = run / "curve.jsonl"
    rows = [json.loads(line) for line in curve.read_text("utf-8").splitlines()] if curve.exists() else []
    return {**json.loads((run / "state.json").read_text("utf-8")), "curve": rows}


# --- what is shown --------------------------------------------------------------------------------------------------


def with_interval(found: Scored) -> str:
    return f"{found['f1']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else "-"


def grids(r: dict[str, Any]) -> list[Grid]:
    """The results as tables, for the screen and for the card."""
    answers = [
        [
            x["set"],
            str(x["contexts"]),
            f"{x['questions']} of {x['of']}",
            str(x["too_long"]),
            with_interval(x.get("with", {})),
            with_interval(x.get("without", {})),
        ]
        for x in r["reading"]
    ]
    answers.append(["known world", "-", str(r["known"]["questions"]), "0", "-", with_interval(r["known"])])
    shares = ("contained", "as_written", "right", "wrong", "no fact")
    pairs = [
        [
            f"{v['contexts']} {name}",
            f"{v['pairs']} of {v['requested']}",
            str(v["nothing_about"]),
            *(f"{v[key]:.1%}" if key in v else "-" for key in shares),
        ]
        for name, v in r["pairs"].items()
    ]
    texts = [
        [name, str(v["texts"]), f"{v['tokens']:,}", f"{v['perplexity']:.1f}", f"{v['bits_per_byte']:.3f}"]
        for name, v in r["prose"].items()
    ]
    return [
        ("Answers", ["questions from", "contexts", "questions", "too long", "with context", "without"], answers),
        (
            "Pairs written by the model itself",
            [
                "contexts",
                "pairs",
                "nothing about",
                "answer in the text",
                "read as written",
                "right",
                "wrong",
                "no known fact",
            ],
            pairs,
        ),
        ("Prose", ["texts", "number", "tokens", "perplexity per token", "bits per byte"], texts),
        ("Size and speed", ["what", "value"], facts(r["model"], r["training"])),
        *curve_grid(r["training"]),
    ]


def facts(model: dict[str, Any], run: dict[str, Any] | None) -> list[list[str]]:
    rows = [
        ["parameters", f"{model['parameters']:,}"],
        ["bytes on disk", f"{model['bytes']:,}" if model["bytes"] else "-"],
        ["window (tokens)", f"{model['window']:,}"],
        ["load (s)", f"{model['load_seconds']:.2f}"],
        ["load with the imports of transformers (s)", f"{model['first_load_seconds']:.2f}"],
        ["generated tokens/s, one row", f"{model['tokens_per_second']['rows_1']:.0f}"],
        ["generated tokens/s, 16 rows", f"{model['tokens_per_second']['rows_16']:.0f}"],
        ["measured on", model["machine"]],
    ]
    if run:
        rows += [["training tokens", f"{run['seen']:,}"], ["training (s)", f"{run['seconds']:,.0f}"]]
        rows += [["about these two", run["note"]]] if "note" in run else []
    return rows


def curve_grid(run: dict[str, Any] | None) -> list[Grid]:
    """At most twelve rows of a run's curve, the last one among them."""
    if not run or not run["curve"]:
        return []
    every = math.ceil(len(run["curve"]) / 12)
    header = list(run["curve"][-1])
    rows = [[str(row.get(h, "-")) for h in header] for row in run["curve"][::-1][::every][::-1]]
    return [("While it was trained (share of answers right in every token)", header, rows)]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = (header, ["---"] * len(header), *rows)
    return ["| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |" for cells in lines] + [""]


def card(r: dict[str, Any]) -> str:
    """The model card: every table, pairs drawn at random, settings and versions."""
    lines = [
        f"# Card of {r['model']['name']}",
        "",
        "Written by `pretraining/evaluate.py`, not by hand. "
        "How the model was made, and from what: `pretraining/README.md`.",
        "",
    ]
    for title, header, rows in grids(r):
        lines += [f"## {title}", "", *([NOTES[title], ""] if title in NOTES else []), *markdown(header, rows)]
    for name, found in r["pairs"].items():
        rows = [[p["context"], p["question"], p["answer"], p["read"]] for p in found["samples"]]
        lines += [
            f"## Pairs about {name}, drawn at random, unselected",
            "",
            *markdown(["about", "question", "answer as written", "answer when read"], rows),
        ]
    lines += [f"Settings: {json.dumps(r['settings'])}. Versions: {json.dumps(r['versions'])}.", ""]
    return "\n".join(lines)


# --- the command ----------------------------------------------------------------------------------------------------


def measure(o: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    run = training(o.run) if o.run else None
    seconds = []
    for _ in range(2):  # the first load imports what transformers needs for it
        started = time.perf_counter()
        lm = LM.load(o.model)
        seconds.append(time.perf_counter() - started)
    folder = embedded_path() if o.model == "embedded" else Path(o.model)
    sets = collect(o.data, o.worlds, o.scenes, o.seed)
    facts_of = {w.context.id: w for w in worlds.held_out(o.authored, o.seed + 1)}
    authored = {
        "worlds": [w.context for w in facts_of.values()],
        "scenes": [x for x, _ in worlds.held_out_passages(o.authored, o.seed + 1)],
    }
    if real := real_passages(lm, sets, o.authored, o.seed):
        authored["real passages"] = real
    return {
        "model": {
            "name": o.name or folder.resolve().name,
            "parameters": lm.parameters,
            "window": lm.window,
            "bytes": size_on_disk(folder) if folder.is_dir() else None,
            "load_seconds": seconds[1],
            "first_load_seconds": seconds[0],
            "tokens_per_second": speed(lm),
            "machine": f"{lm.device.type}, {platform.machine()}, {torch.get_num_threads()} threads",
        },
        "training": run,
        "reading": [reading(lm, name, items, o.real, o.seed, progress) for name, items in sets.items()],
        "known": remembered(lm, o.known, o.seed, progress),
        "pairs": {
            f"{name}{', checked' if checked else ''}": self_written(lm, contexts, checked, facts_of, o, progress)
            for checked in (False, True)
            for name, contexts in authored.items()
        },
        "prose": prose(lm, o.data, o.paragraphs, o.passages, o.seed, progress),
        "settings": {name: getattr(o, name) for name in SIZES},
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
    }


def write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise OutputError(f"cannot write '{path}' ({error.strerror}): choose another file") from error


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face model directory, or 'embedded'")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data"),
        help="folder with qa/ and text/ (default %(default)s); without it the real sets are left out",
    )
    parser.add_argument("--run", type=Path, help="folder of the training run, for its tokens, seconds and curve")
    parser.add_argument("--name", help="what the card calls the model (default: the directory's name)")
    parser.add_argument("--card", type=Path, help="write the card as Markdown")
    parser.add_argument("--json", type=Path, help="write all numbers as JSON")
    for name, (default, meaning) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default %(default)s)")
    options = parser.parse_args()
    for name in SIZES:
        if name != "seed" and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main() -> None:
    options = read_options()
    console = Console(stderr=True)
    if not (options.data / "qa").is_dir():
        console.print(f"no folder '{options.data}/qa': the real sets are left out (name the folder with --data)")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            found = measure(options, progress)
        for title, header, rows in grids(found):
            table = Table(*header, title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            Console().print(table)
        if options.json:
            write(options.json, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        if options.card:
            write(options.card, card(found))
    except SelfParamError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
