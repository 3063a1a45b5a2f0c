"""A table of the paper as a TOML file -> Table: models, data, authors, methods, sizes, and the paper's figures.

Every key is checked; what is wrong is said in one line. Refuses to know how anything is computed.
Source: arXiv 2410.00487, section 4; the layout is described in docs/tables.md.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from selfparam.data.benchmarks import BENCHMARKS
from selfparam.errors import TableError
from selfparam.methods import Method, make_method
from selfparam.metrics.recall import FILTERS, Filter
from selfparam.targets import ROUNDS
from selfparam.targets.recommend import prompt_named
from selfparam.types import content_hash, misfit

Protocol = Literal["single", "batch", "sequential", "recommend"]
AuthorKind = Literal["oracle", "local", "endpoint", "erring", "recommending"]


@dataclass(frozen=True)
class ModelSpec:
    """One model. label: what the table calls it. paper: which column of the paper's figures stands beside it.

    parameters: for the plan of a run whose weights are not here (--dry-run).
    """

    name: str
    label: str = ""
    dtype: str = "auto"
    device: str = "auto"
    paper: str = ""
    parameters: float = 0.0

    @property
    def shown(self) -> str:
        return self.label or self.name


@dataclass(frozen=True)
class AuthorSpec:
    """Who writes the pairs. oracle: the data's own. local: `model` ("self" or another). endpoint: `model` at `url`.

    erring: the pairs of the author `of`, where the share `wrong` of the answers belongs to other contexts' questions.
    recommending: the pairs of `of` (empty: none), and what the model itself recommends at `pairs` turns of each
    conversation, which it has in front: the recommendation `prompt` with at most `tokens` new tokens.
    """

    kind: AuthorKind
    model: str = "self"
    url: str = ""
    prompt: str = ""
    pairs: int = 15
    rounds: int = ROUNDS
    temperature: float = 0.9
    checked: bool = True
    of: str = ""
    wrong: float = 0.0
    tokens: int = 512

    def deciding(self) -> dict[str, Any]:
        """The fields that decide what an author of this kind writes."""
        both = ("model", "prompt", "pairs", "rounds")
        fields = {"oracle": (), "erring": ("of", "wrong"), "endpoint": (*both, "url"),
                  "local": (*both, "temperature", "checked"), "recommending": ("of", "pairs", "prompt", "tokens")}
        return {"kind": self.kind} | {name: getattr(self, name) for name in fields[self.kind]}


@dataclass(frozen=True)
class MethodSpec:
    """One row of the table: a method with its options. author: a name of [authors], where the method reads pairs.

    models: labels of the models that it is for (empty: all), so that a row may have other options on another model.
    first: only that many of the cells (contexts or sequences), for rows that cost much. at_once: in a sequence, absorb
    all contexts in one call. against: label of the row that gains are measured against (empty: SELF-PARAM's against the
    best baseline). pairs: at most so many of the author's pairs for each context (0: all).
    paper: the paper's figures by model, or by model and number of contexts (recommend: and filter, r1 to r4).
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    author: str = ""
    models: tuple[str, ...] = ()
    pairs: int = 0
    first: int = 0
    at_once: bool = False
    against: str = ""
    paper: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Method:
        return make_method(self.method, self.options)

    def paper_figure(self, model: ModelSpec, n: int | str) -> float | None:
        found = self.paper.get(model.paper)
        return found.get(str(n)) if isinstance(found, Mapping) else found

    @property
    def role(self) -> Literal["bound", "baseline", "ours"]:
        """The upper bound is given the right context; ours is SELF-PARAM; everything else is a baseline."""
        if self.method == "base" and self.options.get("context") == "own":
            return "bound"
        return "ours" if self.method == "selfparam" else "baseline"


@dataclass(frozen=True)
class Asking:
    """How the protocol recommend asks. prompt: a file of prompts/ by name. tokens: at most so many new ones.

    filter: which of r1 to r4 intervals and gains are about.
    """

    prompt: str = "recommend"
    tokens: int = 512
    filter: Filter = "r1"


@dataclass(frozen=True)
class Probes:
    """What is asked beside the contexts' own questions: numbers of contexts (leak, fresh), facts, passages; 0: none.

    along: in sequences, fresh, world and KL after every step of ask_at, not only at the end.
    """

    leak: int = 100
    fresh: int = 12
    world: int = 0
    passages: int = 40
    along: bool = False


@dataclass(frozen=True)
class Table:
    """One table. contexts: how many (batch: each size is a block; sequential: contexts in a sequence).

    sequences, ask_at: for sequential: how many, and after how many contexts all questions are asked (empty: each step).
    per_step: for sequential: contexts that are absorbed in one step (a day's).
    questions: at most so many for each context (0: all). keep_questions: whether rows have their texts, or hashes
    (data that may not be passed on). about: the text above the table. recommend: its questions.
    """

    title: str
    protocol: Protocol
    contexts: tuple[int, ...]
    data: Mapping[str, Any]
    models: tuple[ModelSpec, ...]
    methods: tuple[MethodSpec, ...]
    authors: Mapping[str, AuthorSpec] = field(default_factory=dict)
    probes: Probes = field(default_factory=Probes)
    recommend: Asking = field(default_factory=Asking)
    about: str = ""
    sequences: int = 1
    ask_at: tuple[int, ...] = ()
    per_step: int = 1
    questions: int = 0
    keep_questions: bool = True
    seed: int = 0
    folder: str = "."
    name: str = "table"

    @property
    def results(self) -> Path:
        """results/NAME.jsonl beside the folder of tables."""
        return Path(self.folder).parent / "results" / f"{self.name}.jsonl"

    @property
    def needed(self) -> int:
        """Contexts of the largest cell."""
        return max(self.contexts) * (self.sequences if self.protocol == "sequential" else 1)


@dataclass(frozen=True)
class Cell:
    """One unit of work: a method on context `index` (n = 1), on n at once (batch, recommend), or on sequence `index`
    of n."""

    model: ModelSpec
    method: MethodSpec
    n: int
    index: int
    settings: str

    @property
    def id(self) -> str:
        """Hash of what decides the result in the table; rows also name the weights and the data."""
        return content_hash(self.settings, str(self.n), str(self.index))


def cells_of(table: Table) -> list[Cell]:
    """All cells, model by model, size by size, method by method."""
    found = []
    for model in table.models:
        for n in table.contexts:
            for method in methods_of(table, model):
                settings = settings_of(table, model, method)
                count = table.sequences if table.protocol == "sequential" else n if table.protocol == "single" else 1
                size = 1 if table.protocol == "single" else n
                found += [Cell(model, method, size, i, settings) for i in range(min(count, method.first or count))]
    return found


def methods_of(table: Table, model: ModelSpec) -> list[MethodSpec]:
    """The rows of the table for a model."""
    return [method for method in table.methods if not method.models or model.shown in method.models]


def authors_of(table: Table, name: str) -> dict[str, AuthorSpec]:
    """The author of that name, the one whose pairs it takes, and so on; {} for no name."""
    found: dict[str, AuthorSpec] = {}
    while name and name not in found:
        found[name] = table.authors[name]
        name = found[name].of
    return found


def settings_of(table: Table, model: ModelSpec, method: MethodSpec) -> str:
    """What decides a cell's result, as JSON; recipes are written out, so that a changed default is another cell."""
    made = _without_defaults(asdict(method.make()))  # type: ignore[call-overload]
    authors = {name: one.deciding() for name, one in authors_of(table, method.author).items()}
    settings: dict[str, Any] = {
        "protocol": table.protocol, "data": dict(table.data), "probes": _without_defaults(asdict(table.probes)),
        "seed": table.seed, "questions": table.questions, "model": [model.name, model.dtype],
        "method": method.method, "options": made, "author": method.author, "authors": authors, "pairs": method.pairs,
    }
    if any(one["kind"] == "erring" for one in authors.values()):  # takes wrong answers from the other contexts
        settings["contexts"] = table.contexts
    if table.protocol == "sequential":
        settings |= {"ask_at": table.ask_at, "at_once": method.at_once}
        settings |= {"per_step": table.per_step} if table.per_step > 1 else {}
    if table.protocol == "recommend":
        settings |= {"recommend": [content_hash(prompt_named(table.recommend.prompt)), table.recommend.tokens]}
    return json.dumps(settings, sort_keys=True)


def _without_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Without the options that came later, where they are off: the rows from before stay rows of this table."""
    if recipe := given.get("recipe"):
        off = ["rehearsal", "rehearsal_temperature"] if not recipe["rehearsal"] else []
        off += ["retention"] if not recipe["retention"] else []
        off += ["known"] if not (recipe["known"] and recipe["retention"]) else []
        off += ["unrelated_share"] if recipe["unrelated_share"] == 1 else []
        off += ["most_batch_tokens"] if recipe["most_batch_tokens"] <= recipe["batch_tokens"] else []
        given = {**given, "recipe": {k: v for k, v in recipe.items() if k not in off}}
    return {k: v for k, v in given.items() if (k, v) not in (("keep", "nothing"), ("along", False))}


# --- reading ----------------------------------------------------------------------------------------------------------


def read_table(path: str | Path) -> Table:
    """The table of a TOML file. Raises TableError with the file and what is wrong."""
    file = Path(path)
    try:
        raw = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"cannot read the table '{file}' ({getattr(error, 'strerror', 'no UTF-8 text')}): check the "
                         "path") from error
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"{file}: no TOML ({error}): correct the file") from error
    try:
        return _table(raw, file)
    except TableError as error:
        raise TableError(f"{file}: {error}") from error


def _table(raw: dict[str, Any], file: Path) -> Table:
    given = dict(raw)
    for key in ("contexts", "ask_at"):
        if key in given:
            given[key] = tuple(given[key]) if isinstance(given[key], list) else (given[key],)
    given["models"] = tuple(_made(ModelSpec, one, "a model") for one in _tables(given, "models"))
    given["methods"] = tuple(_made(MethodSpec, _with_options(one), "a method") for one in _tables(given, "methods"))
    authors = given.get("authors", {})
    if not isinstance(authors, dict):
        raise TableError("'authors' is no table: write [authors.NAME]")
    given["authors"] = {name: _made(AuthorSpec, one, f"author '{name}'") for name, one in authors.items()}
    given["probes"] = _made(Probes, given.get("probes", {}), "'probes'")
    given["recommend"] = _made(Asking, given.get("recommend", {}), "'recommend'")
    given["folder"], given["name"] = str(file.resolve().parent), file.stem
    table: Table = _made(Table, given, "the table")
    _check(table)
    return table


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_data(data: Mapping[str, Any]) -> None:
    """The kind, its keys and what they hold, by the signature of who makes it. Raises TableError."""
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in BENCHMARKS:
        raise TableError(f"data.kind = {kind!r} is none of {', '.join(BENCHMARKS)}")
    types = get_type_hints(BENCHMARKS[kind])
    known = [p for p in signature(BENCHMARKS[kind]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key, value in data.items():
        if key == "kind":
            continue
        if key not in [p.name for p in known]:
            raise TableError(f"data of the kind '{kind}' has no '{key}': it has {', '.join(p.name for p in known)}")
        must = misfit(value, types[key])
        each = value if isinstance(value, list) else [value]
        if not must and key != "seed" and any(_whole(one) and one < 1 for one in each):
            must = "at least 1"
        if must:
            raise TableError(f"data.{key} = {value!r} must be {must}")
    for p in known:
        if p.default is p.empty and p.name not in data:
            raise TableError(f"data of the kind '{kind}' needs '{p.name}'")


def _tables(given: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = given.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise TableError(f"no [[{key}]]: write at least one")
    return found


def _with_options(one: dict[str, Any]) -> dict[str, Any]:
    """Keys that are no fields of MethodSpec are options of the method."""
    own = {f.name for f in fields(MethodSpec)} - {"options"}
    one = {**one, "models": tuple(one["models"])} if isinstance(one.get("models"), list) else one
    return {**{k: v for k, v in one.items() if k in own}, "options": {k: v for k, v in one.items() if k not in own}}


def _made(kind: Any, given: Any, who: str) -> Any:
    """A dataclass from a TOML table. Raises TableError for keys that it does not have, lacks, or of another type."""
    if not isinstance(given, dict):
        raise TableError(f"{who} is no table: write keys and values")
    known = {f.name: f for f in fields(kind)}
    for key, value in given.items():
        if key not in known:
            raise TableError(f"{who} has no key '{key}': it has {', '.join(known)}")
        default = known[key].default
        if default is MISSING and known[key].type in ("str", "Protocol", "AuthorKind") and not isinstance(value, str):
            raise TableError(f"{who}: {key} = {value!r} is no str")
        if str(known[key].type).startswith("Mapping") and not isinstance(value, Mapping):
            raise TableError(f"{who}: {key} = {value!r} is no table")
        if isinstance(value, (int, float)) and value < 0 and key != "seed":
            raise TableError(f"{who}: {key} = {value!r} is below 0")
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        wrong = number and (isinstance(value, bool) or not isinstance(value, (int, float)))
        wrong = wrong or (isinstance(default, (str, bool)) and not isinstance(value, type(default)))
        if wrong or (isinstance(default, int) and isinstance(value, float)):
            raise TableError(f"{who}: {key} = {value!r} is no {type(default).__name__}")
    lacking = [f.name for f in known.values()
               if f.default is MISSING and f.default_factory is MISSING and f.name not in given]
    if lacking:
        raise TableError(f"{who} lacks '{lacking[0]}'")
    return kind(**given)


def _check(table: Table) -> None:
    """What types do not say. Raises TableError."""
    if table.protocol not in get_args(Protocol):
        raise TableError(f"protocol = {table.protocol!r} is none of {', '.join(get_args(Protocol))}")
    if not table.contexts or not all(_whole(n) and n > 0 for n in table.contexts):
        raise TableError("'contexts' must be a number of contexts, or several for the protocol batch")
    if len(table.contexts) > 1 and table.protocol != "batch":
        raise TableError(f"the protocol {table.protocol} takes one number of contexts")
    if table.sequences < 1 or not all(_whole(i) and 0 <= i <= table.contexts[0] for i in table.ask_at):
        raise TableError("'sequences' must be at least 1, and 'ask_at' steps from 0 to the number of contexts")
    if table.per_step < 1 or any(i % table.per_step and i != table.contexts[0] for i in table.ask_at):
        raise TableError("'per_step' must be at least 1, and 'ask_at' multiples of it")
    if table.recommend.filter not in FILTERS or table.recommend.tokens < 1:
        raise TableError(f"'recommend': filter must be one of {', '.join(FILTERS)}, tokens at least 1")
    prompt_named(table.recommend.prompt)
    _check_data(table.data)
    for name, author in table.authors.items():
        if author.kind not in get_args(AuthorKind):
            raise TableError(f"author '{name}': kind = {author.kind!r} is none of {', '.join(get_args(AuthorKind))}")
        if author.of and author.kind not in ("erring", "recommending"):
            raise TableError(f"author '{name}': 'of' is for the kinds erring and recommending")
        if author.kind == "erring" and (table.authors.get(author.of, author).kind == "erring"
                                        or not 0 <= author.wrong <= 1):
            raise TableError(f"author '{name}': 'of' must name an author who does not err, 'wrong' a share from 0 to 1")
        if author.kind == "recommending" and (author.of not in ("", *table.authors) or author.of == name
                                              or table.protocol != "recommend"):
            raise TableError(f"author '{name}': is for the protocol recommend, and 'of' must name another author")
        if author.of and name in authors_of(table, author.of):
            raise TableError(f"author '{name}' takes its own pairs, by way of '{author.of}': name another one")
    for model in table.models:
        labels = [m.label for m in methods_of(table, model)]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise TableError(f"two methods are called '{twice[0]}': give them different labels")
    for method in table.methods:
        unknown = [label for label in method.models if label not in [m.shown for m in table.models]]
        if unknown:
            raise TableError(f"method '{method.label}': no model is called '{unknown[0]}'")
        if method.against and method.against not in [m.label for m in table.methods]:
            raise TableError(f"method '{method.label}': no method is called '{method.against}'")
        needs = method.make().needs_pairs
        if needs and method.author not in table.authors:
            known = ", ".join(table.authors) or "none is declared"
            raise TableError(f"method '{method.label}' needs an author ({known})")
        if not needs and method.author:
            raise TableError(f"method '{method.label}' reads no pairs: leave out 'author'")
