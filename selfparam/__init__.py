"""selfparam writes documents into the weights of a language model. The public names, imported when they are used.

`selfparam.inject` is always the function, even after the subpackage of the same name has been imported.
Refuses to import torch before somebody asks for a name that needs it. Source: SELF-PARAM, arXiv 2410.00487.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from selfparam.errors import SelfParamError
from selfparam.types import (
    FAST,
    PAPER,
    PAPER_RECOMMEND,
    PAPER_SEQUENTIAL,
    SMALL,
    Context,
    Question,
    Recipe,
    Sentence,
    TargetSet,
)

if TYPE_CHECKING:
    from selfparam.contexts import from_file as read_context
    from selfparam.contexts import read_contexts
    from selfparam.inject import inject
    from selfparam.lm import LM
    from selfparam.metrics.drift import drift, reference
    from selfparam.metrics.qa_f1 import qa_f1
    from selfparam.targets import LocalAuthor, build_target_set
    from selfparam.targets.unrelated import add_unrelated

__all__ = [  # noqa: RUF022 (plain alphabetical order)
    "Context",
    "FAST",
    "LM",
    "LocalAuthor",
    "PAPER",
    "PAPER_RECOMMEND",
    "PAPER_SEQUENTIAL",
    "Question",
    "Recipe",
    "SMALL",
    "SelfParamError",
    "Sentence",
    "TargetSet",
    "add_unrelated",
    "build_target_set",
    "drift",
    "inject",
    "qa_f1",
    "read_context",
    "read_contexts",
    "reference",
]

_LAZY = {
    "LM": ("selfparam.lm", "LM"),
    "LocalAuthor": ("selfparam.targets", "LocalAuthor"),
    "add_unrelated": ("selfparam.targets.unrelated", "add_unrelated"),
    "build_target_set": ("selfparam.targets", "build_target_set"),
    "drift": ("selfparam.metrics.drift", "drift"),
    "qa_f1": ("selfparam.metrics.qa_f1", "qa_f1"),
    "read_context": ("selfparam.contexts", "from_file"),
    "read_contexts": ("selfparam.contexts", "read_contexts"),
    "reference": ("selfparam.metrics.drift", "reference"),
}


def __getattr__(name: str) -> Any:
    """PEP 562: import a name of _LAZY on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'selfparam' has no attribute '{name}'")
    module, attribute = _LAZY[name]
    found = getattr(import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """This package. A property, because importing the subpackage `inject` would otherwise hide the function."""

    @property
    def inject(self) -> Any:
        return import_module("selfparam.inject").inject

    @inject.setter
    def inject(self, subpackage: ModuleType) -> None:
        """The import system sets a subpackage as an attribute of its package: left out on purpose."""


sys.modules[__name__].__class__ = _Package
