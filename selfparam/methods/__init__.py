"""The methods of the paper's tables by name. A new one is a file with a frozen dataclass, and a line here.

Refuses to know experiments. Source: arXiv 2410.00487, tables 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from selfparam.errors import InjectionError, TableError
from selfparam.methods.base import Base
from selfparam.methods.bm25 import BM25
from selfparam.methods.dpr import DPR
from selfparam.methods.finetune import FineTune
from selfparam.methods.infllm import InfLLM
from selfparam.methods.memoryllm import MemoryLLM
from selfparam.methods.protocol import Fronted, Method, Reader, Stacking, Training
from selfparam.methods.raptor import Raptor
from selfparam.methods.readers import Memory
from selfparam.methods.selfparam import Keeping, SelfParam
from selfparam.types import (
    FAST,
    PAPER,
    PAPER_RECOMMEND,
    PAPER_SEQUENTIAL,
    SMALL,
    SMALL_REHEARSAL,
    SMALL_SEQUENTIAL,
    Recipe,
    misfit,
)

__all__ = ["METHODS", "RECIPES", "Fronted", "Keeping", "Memory", "Method", "Reader", "Stacking", "Training",
           "make_method"]

METHODS: dict[str, type[Any]] = {
    "base": Base,
    "bm25": BM25,
    "dpr": DPR,
    "finetune": FineTune,
    "infllm": InfLLM,
    "memoryllm": MemoryLLM,
    "raptor": Raptor,
    "selfparam": SelfParam,
}
RECIPES = {
    "paper": PAPER, "paper-sequential": PAPER_SEQUENTIAL, "paper-recommend": PAPER_RECOMMEND, "fast": FAST,
    "small": SMALL, "small-sequential": SMALL_SEQUENTIAL,
    "small-rehearsal": SMALL_REHEARSAL,
}


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method with its options; `recipe` is a name of RECIPES, or {"from": name, changes}. Raises TableError."""
    if name not in METHODS:
        raise TableError(f"no method '{name}': use one of {', '.join(METHODS)}")
    given = dict(options)
    if "recipe" in given:
        given["recipe"] = make_recipe(given["recipe"])
    check_options(METHODS[name], given, f"method '{name}'")
    found: Method = METHODS[name](**given)
    return found


def make_recipe(given: str | Mapping[str, Any]) -> Recipe:
    """A recipe by name, perhaps with changes. Raises TableError."""
    if not isinstance(given, (str, Mapping)):
        raise TableError(f"recipe = {given!r} is neither a name nor {{ from = \"name\", changes }}")
    changes = {"from": given} if isinstance(given, str) else dict(given)
    name = changes.pop("from", None)
    if name not in RECIPES:
        raise TableError(f"recipe from '{name}': use one of {', '.join(RECIPES)}")
    check_options(Recipe, changes, "a recipe")
    try:
        return RECIPES[name].but(**changes)
    except InjectionError as error:
        raise TableError(str(error)) from error


def check_options(kind: type[Any], given: Mapping[str, Any], who: str) -> None:
    """Keys are fields of the dataclass, values of their types, numbers of a method not below 0. Raises TableError."""
    types = get_type_hints(kind)
    known = [f.name for f in fields(kind) if f.init]
    for key, value in given.items():
        if key not in known:
            raise TableError(f"{who} has no option '{key}': it has {', '.join(known) or 'none'}")
        must = misfit(value, types[key])
        if not must and kind is not Recipe and isinstance(value, (int, float)) and value < 0:
            must = "at least 0"  # a recipe looks at its own
        if must:
            raise TableError(f"{who}: {key} = {value!r} must be {must}")
