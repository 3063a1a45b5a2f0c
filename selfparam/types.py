"""The nouns of selfparam as frozen dataclasses: what is injected, asked and trained on, and how.

Refuses to know models, files and tensors; standard library only.
Source: SELF-PARAM, arXiv 2410.00487 (symbols x, p, s, ℰ in section 3; hyper-parameters in A.2).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from selfparam.errors import InjectionError

Objective = Literal["kl", "next-word"]
Train = Literal["lora", "mlp", "full", "osf"]
#: What a Recipe's numbers must be, where that is not: at least 0.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("epochs", "lora_rank", "lora_alpha", "batch_tokens", "patience"),
                    ("at least 1", lambda v: v >= 1)),
    **dict.fromkeys(("lr", "clip", "unrelated_weight"), ("above 0", lambda v: v > 0)),
    **dict.fromkeys(("lora_dropout", "warmup", "unrelated_share", "held_out"), ("from 0 to 1", lambda v: 0 <= v <= 1)),
    "seed": ("any", lambda v: True),
}


def misfit(value: object, kind: Any) -> str:
    """What a value from a file must be, by an annotation: "" where it is that, or where the annotation is another kind.

    Knows Literal, bool, int, float, str, sequences of them (not empty), and unions with None.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "" if value in args else f"one of {', '.join(args)}"
    if origin in (Union, UnionType):
        found = [misfit(value, one) for one in args if one is not NoneType]
        return "" if value is None or not all(found) else found[0]
    if origin is Sequence:
        whole = isinstance(value, (list, tuple)) and value and not any(misfit(one, args[0]) for one in value)
        return "" if whole else f"a list, of which each is {_WORDS[args[0]]}"
    if kind not in _WORDS:
        return ""
    wrong = isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind)
    return _WORDS[kind] if wrong else ""


_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def content_hash(*parts: str) -> str:
    """First 16 hex digits of the SHA-256 of the parts, separated unambiguously."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Context:
    """x: one document or experience. `id` is the hash of the text; `title` and `source` are for people."""

    text: str
    title: str = ""
    source: str = ""
    id: str = field(default="")

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", content_hash(self.text))

    @property
    def document(self) -> str:
        """The source of the whole: "report.pdf" for its piece "report.pdf#2", else the own source."""
        return re.sub(r"#\d+\Z", "", self.source)


@dataclass(frozen=True)
class Question:
    """p: what is asked afterwards. A prediction scores the maximum over `answers`; `about` is a Context id."""

    text: str
    answers: tuple[str, ...]
    about: str | None = None


@dataclass(frozen=True)
class Sentence:
    """s: one target sentence.

    With a `prompt`, a question and its answer; with an empty `prompt`, plain text (`completion`).
    `about` is the id of its Context; None means unrelated. rehearsed: written from memory, about what was learned
    before: the model that learns is its teacher, whoever teaches the others.
    """

    prompt: str
    completion: str
    about: str | None = None
    rehearsed: bool = False


@dataclass(frozen=True)
class TargetSet:
    """ℰ: the target sentences of one context, and who wrote them (`author` = generator and prompt hash)."""

    context: Context
    related: tuple[Sentence, ...]
    unrelated: tuple[Sentence, ...] = ()
    author: str = ""

    @property
    def id(self) -> str:
        parts = [self.context.text, self.author]
        parts += [f"{s.prompt}\t{s.completion}" for s in (*self.related, *self.unrelated)]
        return content_hash(*parts)


@dataclass(frozen=True)
class Recipe:
    """How θ becomes θ'. Learning rates are per optimiser step, lengths in tokens.

    objective          "kl" = Eq. 2; "next-word" = cross-entropy on the sentence's own tokens (the FT baselines)
    train              "lora" (merged afterwards), "mlp" (MLP matrices only), "full", "osf" (peft's orthogonal subspace)
    teacher_sees_x     for unrelated sentences: True is Eq. 2 to the letter, False lets them hold the model where it was
    loss_on            "pair": every token of s; "answer": only the completion
    unrelated_weight   factor on the loss of unrelated sentences
    unrelated_share    share of the unrelated sentences that one epoch trains on, drawn anew for every epoch
    batch_tokens       student tokens in one optimiser step (rows are packed whole)
    most_batch_tokens  an epoch of more than 32 steps takes larger ones instead, up to so many tokens; 0: it does not
    retention          how strongly the last hidden states of earlier injections' sentences are held where they were, in
                       an injection after others (inject/curvature.py); 0: they are not
    known              with retention: so many sentences that the model writes before a first injection are held, in
                       that one, too (own.py)
    rehearsal          at most so many sentences from memory, in an injection after others (targets/rehearsal.py)
    rehearsal_temperature   of their questions; answers are the most likely ones
    top_k              what is kept of the teacher: 0 its last hidden states (the exact KL over the vocabulary); k the
                       probabilities of its k likeliest tokens and of the rest together
    held_out           share of the related sentences that is not trained on but measured after every epoch; 0 none
    patience           with held_out: stop when so many epochs in a row brought no lower loss on it
    precision          "auto": bf16 autocast where the hardware multiplies bf16 matrices; "bf16": everywhere; "fp32": no
                       autocast (LoRA in 16-bit weights has products in 16 bits all the same)

    Raises InjectionError for a word, a number or a type that it has no use for.
    """

    objective: Objective = "kl"
    train: Train = "lora"
    epochs: int = 50
    lr: float = 2e-5
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    warmup: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    clip: float = 1.0
    batch_tokens: int = 1024
    most_batch_tokens: int = 0
    teacher_sees_x: bool = True
    loss_on: Literal["pair", "answer"] = "pair"
    unrelated_weight: float = 1.0
    unrelated_share: float = 1.0
    retention: float = 0.0
    known: int = 0
    rehearsal: int = 0
    rehearsal_temperature: float = 1.0
    top_k: int = 0
    held_out: float = 0.0
    patience: int = 2
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Recipe).items():
            value, words = getattr(self, name), get_args(kind)
            least, holds = _RANGES.get(name, ("at least 0", lambda v: v >= 0))
            must = misfit(value, kind)
            if not must and not words and not holds(value):
                must = least
            if must:
                raise InjectionError(f"the recipe's {name} is {value!r}: it must be {must}")

    def but(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


#: The paper's values for 3-8B models (A.2): lr 2e-5, 50 epochs, LoRA r 8, alpha 32, dropout 0.1, Eq. 2 to the letter.
PAPER = Recipe()
#: Sequential injection (A.2): 20 epochs a step.
PAPER_SEQUENTIAL = PAPER.but(epochs=20)
#: Conversational recommendation (A.2): one epoch.
PAPER_RECOMMEND = PAPER.but(epochs=1)
#: For 3-8B models, in fewer steps; not measured by us. LoRA's learning rate is ten times the full model's (Schulman et
#: al., "LoRA Without Regret", https://thinkingmachines.ai/blog/lora; alpha 32): 2e-4, constant, as in QLoRA for 7B and
#: 13B (arXiv 2305.14314). Rank and dropout are ours. It ends when held-out pairs no longer improve.
FAST = PAPER.but(epochs=20, lr=2e-4, lora_rank=32, lora_dropout=0.0, held_out=0.1)
#: For models of tens of millions of parameters, found by measurement on the embedded model (docs/LOG.md).
SMALL = Recipe(
    epochs=20,
    lr=3e-3,
    lora_rank=32,
    lora_alpha=64,
    lora_dropout=0.0,
    schedule="linear",
    warmup=0.05,
    batch_tokens=256,
    most_batch_tokens=2048,
    teacher_sees_x=False,
    loss_on="answer",
)
#: For one injection after another into such a model: what was learned before is held (inject/curvature.py), and what
#: it knew before the first.
SMALL_SEQUENTIAL = SMALL.but(epochs=14, lora_rank=64, retention=0.1, known=100, unrelated_share=0.5)
#: The same where only the weights are at hand: what the model writes from memory holds what it has learned. All tokens
#: of a pair are trained, questions too: a model rehearses only what it would ask by itself.
SMALL_REHEARSAL = SMALL.but(rehearsal=500, loss_on="pair", unrelated_share=0.5)
