"""The one family of errors that onnxprune raises on purpose, and their exit codes.

The command line catches `OnnxPruneError` and nothing else: any other exception is a bug and shows its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

__all__ = [
    "BadDataError",
    "BudgetMissedError",
    "InterruptedRunError",
    "MissingExtraError",
    "ModelError",
    "OnnxPruneError",
    "OutputError",
    "PassError",
    "PluginError",
    "PreconditionError",
    "TargetError",
    "UsageError",
    "VerificationError",
    "did_you_mean",
    "disk_errors",
    "quoted_list",
]


class OnnxPruneError(Exception):
    """What went wrong, where and why (`message`), and what the user can do about it (`hint`)."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message} {hint}")
        self.message = message
        self.hint = hint


class UsageError(OnnxPruneError):
    """The command line, the recipe or a call asks for something that does not exist or does not fit."""

    exit_code = 2


class PreconditionError(UsageError):
    """A pass or target needs something that the run does not have (calibration data, an evaluator, a host)."""


class ModelError(OnnxPruneError):
    """The source can't be read, or holds what onnxprune does not support."""

    exit_code = 3


class MissingExtraError(OnnxPruneError):
    """An optional dependency is not installed."""

    exit_code = 4

    def __init__(self, *, package: str, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package '{package}', which is not installed.",
            f"Install it with: pip install 'onnxprune[{extra}]'.",
        )
        self.package = package
        self.extra = extra


class PassError(OnnxPruneError):
    """A pass could not do its work on this model."""

    exit_code = 5


class VerificationError(OnnxPruneError):
    """A model that onnxprune produced breaks its own rules: a bug of onnxprune, never of the user."""

    exit_code = 6


class TargetError(OnnxPruneError):
    """A target could not build, load or run its artifact."""

    exit_code = 7


class BudgetMissedError(OnnxPruneError):
    """The artifact is there, but misses a budget of the recipe."""

    exit_code = 8


class PluginError(OnnxPruneError):
    """Code of a third party (plug-in, factory, evaluator, data function) failed or has the wrong form."""

    exit_code = 9


class BadDataError(OnnxPruneError):
    """Calibration or evaluation data do not fit the model, or hold values that can't be used."""

    exit_code = 10


class OutputError(OnnxPruneError):
    """Reading or writing files failed: full disk, no permission, missing folder."""

    exit_code = 11


class InterruptedRunError(OnnxPruneError):
    """The user pressed Ctrl-C."""

    exit_code = 130


def quoted_list(names: Iterable[str], limit: int = 5) -> str:
    """Names in single quotes, separated by commas, at most `limit` of them and then how many more there are."""
    all_names = list(names)
    shown = ", ".join(f"'{name}'" for name in all_names[:limit])
    hidden = len(all_names) - limit
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name: the nearest known one, then all known ones."""
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"Did you mean '{near[0]}'? " if near else ""
    return f"{guess}Known: {', '.join(known)}." if known else guess.rstrip()


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn the operating system's refusals inside the block into an `OutputError` that says what was being done."""
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: "Free some space, or choose another folder with --out.",
            errno.EDQUOT: "Free some of your quota, or choose another folder with --out.",
            errno.EACCES: "Choose a folder that you may write to with --out.",
            errno.EPERM: "Choose a folder that you may write to with --out.",
            errno.EROFS: "Choose a folder on a writable disk with --out.",
        }.get(error.errno or 0, "")
        place = f" ('{error.filename}')" if error.filename else ""
        raise OutputError(f"{doing} failed: {error.strerror or error}{place}.", hint) from error
