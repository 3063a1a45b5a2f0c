"""The exceptions of selfparam. Each carries one line that says what was wrong and what to do next.

    SelfParamError                 everything below; the command line prints it and exits with code 2
    ├── ContextError               a file or record cannot become a Context
    ├── TargetError                a target set cannot be read, or an author wrote nothing usable
    │   └── AuthorError            the endpoint or model that writes the questions failed
    ├── DataError                  a data set cannot be read, fetched or scored
    ├── ModelError                 a model cannot be loaded, or is of a kind that would be trained wrongly
    ├── InjectionError             training failed: a loss that is not finite, nothing to train
    │   └── VerificationError      merged, trained and reloaded weights disagree
    ├── TableError                 a table of experiments is declared wrongly, or an extra that it needs is missing
    ├── RefusedError               the guard refused an update: it is kept aside, or was not begun
    ├── StoreError                 a folder is no store, is damaged, or another process writes to it
    ├── StoppedError               stopped on request (Ctrl-C, SIGTERM): what was done is saved
    └── OutputError                a result cannot be written (exists, disk full, read-only)
"""

from __future__ import annotations


class SelfParamError(Exception):
    """Root of all errors that a user can do something about."""


class ContextError(SelfParamError):
    """A file or record cannot become a Context."""


class TargetError(SelfParamError):
    """A target sentence set cannot be read or is empty."""


class AuthorError(TargetError):
    """The author (model or endpoint) failed."""


class DataError(SelfParamError):
    """A data set cannot be read, fetched or scored."""


class ModelError(SelfParamError):
    """A model cannot be loaded or is refused."""


class InjectionError(SelfParamError):
    """Training failed."""


class VerificationError(InjectionError):
    """Merged, trained and reloaded weights disagree."""


class TableError(SelfParamError):
    """A table of experiments cannot be read or run."""


class RefusedError(SelfParamError):
    """The guard refused an update."""


class StoreError(SelfParamError):
    """A folder is no store, is damaged, or is in use."""


class StoppedError(SelfParamError):
    """Stopped on request; what was done is saved."""


class OutputError(SelfParamError):
    """A result cannot be written."""
