"""The command line: selfparam demo | inject | targets | ask | inspect; files of their own: run | table, score, stores.

Reads options, checks that the output is free before any work is done, and turns errors into one line and exit code 2.
What commands share is in steps.py, what they print in report.py. Torch is imported inside commands, so --help is quick.
Refuses to know how anything is computed. Source: SELF-PARAM, arXiv 2410.00487; section numbers in the other rooms.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import resources
from io import TextIOWrapper
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import typer

from selfparam.cli import store as stores
from selfparam.cli import tables
from selfparam.cli.score import score
from selfparam.errors import ModelError, OutputError, SelfParamError, StoppedError, StoreError
from selfparam.report import (
    Journal,
    answers_table,
    contexts_table,
    drift_line,
    history_table,
    output,
    plain,
    scores_table,
)
from selfparam.store import RECORD, check_out, history_of, read_record, unfinished_beside, writing_beside
from selfparam.store.snapshots import Store, is_store
from selfparam.types import SMALL_REHEARSAL, SMALL_SEQUENTIAL, Context, Objective, Train

#: Before the libraries are imported: no log lines, no bars of their own, no threads that forking would break.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
          "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
INTERRUPTED = 130

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Writes documents into the weights of a language model: afterwards it answers without having them in front. "
         "Begin with: selfparam demo",
)

app.add_typer(score, name="score")

_FILE_HELP = "Documents: .txt .md .html .pdf .docx .jsonl, folders, or - for standard input."
_QUESTIONS_HELP = (
    'Held-out questions to score before and after: .jsonl of {"question", "answers"}, with "context" (the name or '
    "title of a file) where there are several."
)
Model = Annotated[str, typer.Argument(
    metavar="MODEL",
    help="'embedded' (the small model of this package), a Hugging Face model directory, a hub name, or a store (its "
         "head).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines and nothing else.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same weights.")]
Field = Annotated[str, typer.Option(help="Field of a .jsonl line that holds the text.")]
Offline = Annotated[bool, typer.Option("--offline", help="Refuse everything that needs the network.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(
    help="Type of the weights; auto: float32 on a CPU, the model's own on a GPU.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Pairs = Annotated[int, typer.Option(min=1, help="Question-answer pairs to write about each document.")]
AuthorName = Annotated[str, typer.Option(
    "--author", help="Who writes the pairs: 'self' (where earlier sentences are rehearsed, the model before all "
                     'injections), another model (directory or hub name), or a .jsonl file of your own '
                     '{"question", "answer"} lines.')]
Endpoint = Annotated[str | None, typer.Option(
    help="Address of an OpenAI-compatible server that writes the pairs; its key is read from OPENAI_API_KEY.")]
EndpointModel = Annotated[str | None, typer.Option("--author-model", help="Name of the model at the endpoint.")]
Prompt = Annotated[str | None, typer.Option(
    help="Prompt for the author: 'brief' (default for models), 'paper' (default for endpoints), or a text file with "
         "{context}.")]
Unrelated = Annotated[str, typer.Option(
    help="Unrelated sentences that keep the model as it was: 'self' (it writes them), 'packaged', 'slimpajama' "
         "(network), or a text file.")]
Ratio = Annotated[float | None, typer.Option(
    min=0.0, callback=stores.finite, show_default=False,
    help="Unrelated sentences for each pair; not given: 4 in an epoch, or 1 for the paper's recipe.")]


# --- commands -------------------------------------------------------------------------------------------------------


@app.command()
def demo(machine: Json = False, seed: Seed = 0) -> None:
    """Inject three short documents into the embedded model and ask it before and after. Writes nothing.

    The model writes its own training pairs; the questions of the table are none of them.

    Example: selfparam demo
    """
    journal = Journal(machine)
    from selfparam import steps
    from selfparam.contexts import read_contexts
    from selfparam.targets import LocalAuthor

    folder = Path(str(resources.files("selfparam") / "embedded" / "documents"))
    contexts = read_contexts([folder / name for name in ("town.txt", "company.txt", "musician.txt")])
    questions = steps.read_questions(folder / "questions.jsonl", contexts)
    lm = steps.load("embedded", journal)
    recipe = steps.choose_recipe(lm, "small", seed=seed, retention=0.03)
    sets, report = steps.pairs_by(LocalAuthor(lm, seed=seed), contexts, 40, journal, rounds=5)
    sets, same = steps.without_questions(sets, questions, journal)
    sets = steps.with_unrelated(lm, sets, journal, source="self", ratio=None, recipe=recipe)
    exam = steps.exam_of("the questions above", questions, sets)
    done, drift = steps.run(lm, sets, recipe, [exam], journal)
    memory = steps.peak_memory_mb(lm.device)
    if machine:
        _print_json({
            **exam.as_dict(), "drift": drift, "losses": done.trained.losses, "parameters": lm.parameters, "seed": seed,
            "pairs": {"requested": report.requested, "kept": report.kept, "same_as_a_question": same},
            "seconds": journal.elapsed, "seconds_of_steps": journal.seconds, "peak_memory_mb": memory,
            "notes": journal.notes,
        })
        return
    console = output()
    console.print(answers_table(exam.as_dict()), scores_table({exam.label: exam.scores()}))
    console.print(drift_line(drift))
    console.print(f"{journal.elapsed:.0f} seconds" + (f", {memory:.0f} MB of memory at most" if memory else ""))
    console.print("\nNext, a document of your own:  selfparam inject embedded notes.txt --out my-model\n"
                  'and ask about it:              selfparam ask my-model "Who wrote the notes?"')


@app.command()
def inject(
    given: typer.Context,
    model: Annotated[str, typer.Argument(
        metavar="MODEL",
        help="'embedded', a Hugging Face model directory, a hub name, or a store that 'selfparam init' made.")],
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help=_FILE_HELP)] = None,
    out: Annotated[str | None, typer.Option(
        help="Folder to write the new model to; it must be new or empty. A store needs none.")] = None,
    pairs: Pairs = 15,
    targets: Annotated[str | None, typer.Option(
        help="Target sets that 'selfparam targets' wrote and you may have edited, instead of new ones.")] = None,
    author: AuthorName = "self",
    endpoint: Endpoint = None,
    author_model: EndpointModel = None,
    prompt: Prompt = None,
    unrelated: Unrelated = "self",
    ratio: Ratio = None,
    recipe: Annotated[Literal["auto", "paper", "fast", "small"], typer.Option(
        help="Training settings; auto: small or paper, by the model's size; fast: fewer steps, 3-8B models.")] = "auto",
    train: Annotated[Train | None, typer.Option(help="Weights to train; LoRA is merged afterwards.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs, instead of the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(
        min=0.0, callback=stores.finite, help="Learning rate, instead of the recipe's.")] = None,
    objective: Annotated[Objective | None, typer.Option(
        help="kl: SELF-PARAM; next-word: plain fine-tuning on the same sentences.")] = None,
    retention: Annotated[float | None, typer.Option(
        min=0.0, callback=stores.finite, show_default=False,
        help="How strongly what the model knew is held, and in a store what it learned; 0: not at all. Not given: in "
             f"stores {SMALL_SEQUENTIAL.retention:g} for small models (less for a document that corrects what the "
             "model knows), else 0. Without a store 0.03 took most of the drift away (embedded model).")] = None,
    rehearsal: Annotated[int | None, typer.Option(
        min=0, help="At most so many sentences that the model writes from memory, where something was injected "
                    f"before; not given: {SMALL_REHEARSAL.rehearsal} for small models without retention, else none.",
        show_default=False)] = None,
    questions: Annotated[str | None, typer.Option(help=_QUESTIONS_HELP)] = None,
    adapter: Annotated[bool, typer.Option(
        "--adapter", help="Write the LoRA weights alone too, to adapter/, as peft reads them.")] = False,
    field: Field = "text",
    offline: Offline = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option(
        "--resume", help="Continue what was interrupted, with the options it had: only MODEL and --out are given.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Drop what was interrupted and begin anew.")] = False,
    checkpoint_every: Annotated[float, typer.Option(min=0.0, help="Seconds between two checkpoints.")] = 60.0,
    probes: Annotated[str | None, typer.Option(
        help="Stores: questions about earlier documents, which the guard asks before and after: .jsonl of "
             '{"question", "answers"}.')] = None,
    force: Annotated[bool, typer.Option(
        "--force", help="Stores: make it the head even where the guard objects; that is recorded.")] = False,
    machine: Json = False,
) -> None:
    """Write documents into the weights of a model and save the new model.

    Someone (by default the model itself) writes question-answer pairs about each document; then the weights are trained
    until the model answers without the document what it answers with it. The result is an ordinary model directory, or
    the next snapshot of a store.

    Example: selfparam inject embedded notes/ report.pdf --out my-model

    Example: selfparam inject my-store notes/monday.md
    """
    journal = Journal(machine)
    store = Store.open(model) if is_store(model) else None
    if store is None and out is None:
        raise typer.BadParameter("where to? Add --out DIR for a model directory, or make a store: "
                                 f"selfparam init STORE --model {quote(model)}")
    wrong = [option for option, used in (("--out", out), ("--adapter", adapter), ("--dtype", dtype != "auto")) if used]
    if store and wrong:
        raise typer.BadParameter(f"a store takes no {wrong[0]}: leave it out, and see 'selfparam export'")
    if store is None and (probes or force):
        raise typer.BadParameter("--probes and --force are for stores: make one with 'selfparam init'")
    place = store.unfinished if store else unfinished_beside(str(out))
    idle = [one for one in _typed(given) if one in ("pairs", "author", "endpoint", "author_model", "prompt")]
    if targets and idle:
        raise typer.BadParameter(f"--targets has its pairs already: leave out --{idle[0].replace('_', '-')}")
    command = f"selfparam inject {quote(model)}" + ("" if store else f" --out {quote(str(out))}")
    if out is not None and not place.is_dir():  # else when that has been seen to
        check_out(out)
    with store.writing() if store else writing_beside(str(out)):
        waiting = (place / "job.json").is_file()
        if out is not None and not (resume and waiting):
            check_out(out)
        if resume:
            _nothing_else(given, {"model", "out", "resume", "checkpoint_every", "machine"})
        elif waiting and not restart:
            raise StoreError(f"an interrupted injection is waiting: continue it with '{command} --resume', "
                             "or drop it with --restart")
        elif not files and not targets:
            raise typer.BadParameter("nothing to inject: name a file, a folder, or - for standard input (or --targets)")
        if adapter and train not in (None, "lora"):
            raise typer.BadParameter(f"--train {train} has no adapter: leave out --adapter, or use --train lora")
        _check_endpoint(endpoint, author_model, offline)
        _check_source(unrelated, offline)
        history = [] if model == "embedded" or store else history_of(model)
        from selfparam.cli import injecting

        if resume:
            job = injecting.read_job(place)
            if store is None and Path(job.model).resolve() != Path(model).resolve():
                raise OutputError(f"what was interrupted is an injection into '{job.model}', not '{model}': name that "
                                  "model, or drop it with --restart")
            if out is not None and not injecting.is_written(job, out):
                check_out(out)
            start = injecting.load(job, store, history, journal)
        else:
            contexts = _read(files, field, journal)
            job, start = injecting.prepare(
                injecting.Wishes(
                    model=model, targets=targets, pairs=pairs, author=author, endpoint=endpoint,
                    endpoint_model=author_model, prompt=prompt, unrelated=unrelated, ratio=ratio, recipe=recipe,
                    changes={"train": train, "epochs": epochs, "lr": lr, "objective": objective, "seed": seed,
                             "retention": retention, "rehearsal": rehearsal},
                    questions=questions, probes=probes, adapter=adapter, offline=offline, dtype=dtype, device=device,
                    force=force, history=history,
                ), contexts, store, out, journal)
            if waiting:
                injecting.drop_job(place)
            injecting.save_job(place, job)
        injecting.finish(job, start, store, out, place, journal, machine, command=f"{command} --resume",
                         every=checkpoint_every, history=history)


@app.command()
def targets(
    model: Model,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help=_FILE_HELP)],
    out: Annotated[str, typer.Option(help="File to write the target sets to (JSONL); it must be new.")],
    pairs: Pairs = 15,
    author: AuthorName = "self",
    endpoint: Endpoint = None,
    author_model: EndpointModel = None,
    prompt: Prompt = None,
    unrelated: Unrelated = "self",
    ratio: Ratio = None,
    field: Field = "text",
    offline: Offline = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    machine: Json = False,
) -> None:
    """Write what would be trained on to a file: read it, edit it, and pass it to 'selfparam inject --targets'.

    Example: selfparam targets embedded report.pdf --out sets.jsonl
    """
    journal = Journal(machine)
    store = Store.open(model) if is_store(model) else None
    if store and dtype != "auto":
        raise typer.BadParameter("a store takes no --dtype: leave it out")
    _check_endpoint(endpoint, author_model, offline)
    _check_source(unrelated, offline)
    check_out(out, file=True)
    history = [] if model == "embedded" or store else history_of(model)
    from selfparam import learn, steps
    from selfparam.cli import injecting
    from selfparam.targets import write_sets

    contexts = _read(files, field, journal)
    parent = store.find() if store else None
    lm = (learn.load_snapshot(store, parent, journal, device) if store and parent else
          steps.load(model, journal, dtype=dtype, device=device, offline=offline))
    recipe, start, writer = injecting.plan(lm, store, parent, history, journal, device, "auto", seed=seed)
    sets = steps.written_sets(
        writer, contexts, journal, author=author, prompt=prompt, pairs=pairs, seed=seed, offline=offline,
        endpoint=endpoint, endpoint_model=author_model,
    )
    sets = steps.with_unrelated(
        start.first or lm, sets, journal, source=unrelated, ratio=ratio, recipe=recipe)
    Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
    write_sets(out, sets)
    related, others = sum(len(one.related) for one in sets), sum(len(one.unrelated) for one in sets)
    if machine:
        _print_json({"out": out, "contexts": len(sets), "pairs": related, "unrelated": others, "notes": journal.notes})
        return
    output().print(f"written: {plain(out)} ({len(sets)} contexts, {related} pairs, {others} unrelated sentences)",
                   soft_wrap=True)


@app.command()
def ask(
    model: Model,
    question: Annotated[str, typer.Argument(help="The question.")],
    context: Annotated[str | None, typer.Option(
        help="A document to put in front of the question (- for standard input).")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    offline: Offline = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    machine: Json = False,
) -> None:
    """Ask a model a question, from memory or with a document in front.

    Example: selfparam ask my-model "Who signed the report?"
    """
    journal = Journal(machine)
    if not question.strip():
        raise typer.BadParameter("the question is empty: write one")
    from selfparam import steps

    found = _read([context], "text", journal) if context else [None]
    if len(found) != 1:
        raise typer.BadParameter(f"'{context}' holds {len(found)} documents: name one file with one of them")
    [x] = found
    lm = steps.load(_weights_of(model), journal, dtype=dtype, device=device, offline=offline)
    with journal.step("answering"):
        [answer] = lm.answer([question], x.text if x else None, max_new_tokens=max_new_tokens)
    if machine:
        _print_json({"question": question, "answer": answer, "context": x.source if x else None})
        return
    output().print("\n".join(plain(line) for line in answer.splitlines()), soft_wrap=True)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that 'selfparam inject' wrote.")],
    machine: Json = False,
) -> None:
    """Show what was injected into a model, when, and how well.

    Example: selfparam inspect my-model
    """
    if is_store(folder):
        raise StoreError(f"'{folder}' is a store: look at it with 'selfparam log {folder}'")
    record = read_record(folder)
    if machine:
        _print_json(record)
        return
    recipe = ", ".join(f"{key} {value}" for key, value in record["recipe"].items())
    try:
        shown = history_table(record), contexts_table(record["contexts"]), scores_table(record["scores"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"'{Path(folder) / RECORD}' is damaged ({error!r}): restore it from a copy") from error
    output().print(*shown, drift_line(record["drift"]), f"recipe: {plain(recipe)}", sep="\n")


for _command in (stores.init, stores.log, stores.diff, stores.checkout, stores.rollback, stores.export, stores.verify,
                 stores.gc, tables.run, tables.table):
    app.command()(_command)


# --- around the commands --------------------------------------------------------------------------------------------


def _check_endpoint(endpoint: str | None, author_model: str | None, offline: bool) -> None:
    if endpoint and not author_model:
        raise typer.BadParameter("an endpoint needs the name of its model: add --author-model NAME")
    if offline and author_model:
        raise typer.BadParameter("--offline refuses endpoints: leave out one of the two")


def _check_source(unrelated: str, offline: bool) -> None:
    if offline and unrelated == "slimpajama":
        raise typer.BadParameter("--offline refuses slimpajama: use --unrelated self, packaged or a text file")
    if unrelated not in ("self", "packaged", "slimpajama"):
        from selfparam.targets.unrelated import from_file

        from_file(unrelated)  # now, not when all pairs are written


def _nothing_else(given: typer.Context, allowed: set[str]) -> None:
    """BadParameter for an option beside --resume: what is continued has its own."""
    for name in _typed(given):
        if name not in allowed:
            raise typer.BadParameter(f"--resume continues with the options that were given: leave out '{name}'")


def _typed(given: typer.Context) -> list[str]:
    """The names of what stands on the command line."""
    names = [name for name, value in given.params.items() if value not in (None, [])]
    return [name for name in names if getattr(given.get_parameter_source(name), "name", "") == "COMMANDLINE"]


def _weights_of(model: str) -> str:
    """The model directory of a store's head; anything else as it is."""
    if not is_store(model):
        return model
    from selfparam.store.weights import model_folder

    store = Store.open(model)
    return str(model_folder(store, store.find()))


def _read(files: Sequence[str] | None, field: str, journal: Journal) -> list[Context]:
    """The contexts of the files, with a note for what was skipped."""
    from selfparam.contexts import read_contexts

    notices: list[str] = []
    contexts = read_contexts(files, field=field, notices=notices) if files else []
    for notice in notices:
        journal.note(notice)
    return contexts


def _print_json(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def _fail(reason: str) -> int:
    print("error: " + plain(" ".join(reason.split())), file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0, 2 for whatever a user can do something about, 130 for Ctrl-C."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal has not is no reason to fail
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = app(given, standalone_mode=False, prog_name="selfparam")
    except StoppedError as error:
        print(plain(str(error)), file=sys.stderr)
        return INTERRUPTED
    except SelfParamError as error:
        return _fail(str(error))
    except typer.TyperException as error:
        return _fail(f"{error.format_message()} (selfparam {given[0]} --help shows the options)")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}: make room, or check the path and its permissions")
    except (MemoryError, RuntimeError) as error:
        said = str(error).lower()
        if not isinstance(error, MemoryError) and "out of memory" not in said and "can't allocate memory" not in said:
            raise
        return _fail("out of memory: use a smaller model or shorter documents, or LoRA with --dtype bfloat16")
    if code == INTERRUPTED:
        kept = "what is finished is kept, the same command goes on" if given[0] == "run" else "nothing was written"
        print(f"interrupted: {kept}", file=sys.stderr)
    return int(code or 0)
