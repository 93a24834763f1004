"""Functions that users write: found by `path/file.py:function` or `package.module:function`, and called behind a fence.

This is a plug-in boundary: whatever such code raises becomes a `PluginError` that names the file and line in the
user's own code. What it prints goes to stderr, because stdout carries results only.

A file is imported under a name of its own (two files called `score.py` don't collide). Its folder goes to the front of
`sys.path`, as Python does for scripts, so that it can import its siblings; the same holds for the working directory
when a module is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from onnxprune.errors import BadDataError, OnnxPruneError, PluginError, UsageError, did_you_mean

__all__ = ["FunctionSpec", "call_user_code", "iterate_user_code", "load_callable", "parse_function_spec"]

ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")

_FUNCTION_SPEC = re.compile(r"(?P<where>.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")
_SHOWN_CHARACTERS = 100
_OWN_FOLDER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """Where a function is: `file` for 'path/file.py:function', else None and `module` is a dotted name."""

    file: Path | None
    module: str
    function: str


def parse_function_spec(text: str) -> FunctionSpec | None:
    """The parts of 'path/file.py:function' or 'package.module:function'; None where `text` is neither.

    An existing path wins: a folder may have a colon in its name.

    Raises:
        UsageError: It looks like one, but the operating system takes no such name (too long, for one).
    """
    found = _FUNCTION_SPEC.fullmatch(text)
    if found is None:
        return None
    try:
        if Path(text).exists():
            return None
    except OSError as error:
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
        raise UsageError(f"'{shown}' can't be looked for: {error.strerror}.", "Check the path.") from error
    where = found["where"]
    if where.endswith(".py"):
        return FunctionSpec(file=Path(where), module="", function=found["function"])
    return FunctionSpec(file=None, module=where, function=found["function"])


def load_callable(spec: str, *, what: str) -> Callable[..., Any]:
    """The function that `spec` names. Importing its file or module runs the code in it.

    Args:
        spec: 'path/file.py:function' or 'package.module:function'.
        what: What it is for, as messages begin with it ("Evaluator", "Data function", "Factory").

    Raises:
        UsageError: `spec` has another form, or there is no such file, module or function.
        PluginError: The file or module fails while it is imported; says where.
    """
    parsed = parse_function_spec(spec)
    if parsed is None:
        raise UsageError(
            f"{what} '{spec}' is not of the form 'path/file.py:function' or 'package.module:function'.",
            "Check the path and the name of the function.",
        )
    module = _import_module(parsed, spec, what) if parsed.file is None else _import_file(parsed.file, spec, what)
    function = getattr(module, parsed.function, None)
    if function is None:
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UsageError(
            f"{what} '{spec}': there is no function '{parsed.function}' in '{parsed.file or parsed.module}'.",
            did_you_mean(parsed.function, sorted(known)),
        )
    if not callable(function):
        raise UsageError(
            f"{what} '{spec}': '{parsed.function}' is not a function but of type '{type(function).__name__}'.",
            "Name a function.",
        )
    return function  # type: ignore[no-any-return]


def call_user_code(function: Callable[..., ResultT], *arguments: Any, spec: str, what: str) -> ResultT:
    """Call `function(*arguments)`.

    Raises:
        PluginError: It raised something; names the line of the user's code.
        OnnxPruneError: Raised by onnxprune below the user's code, except for data that the user's code fed wrongly.
    """
    with _fence(spec, what):
        return function(*arguments)


def iterate_user_code(iterable: Iterable[ItemT], *, spec: str, what: str) -> Iterator[ItemT]:
    """The items of `iterable`, whose code is fenced as in `call_user_code`."""
    with _fence(spec, what):
        iterator = iter(iterable)
    while True:
        with _fence(spec, what):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextlib.contextmanager
def _fence(spec: str, what: str) -> Iterator[None]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        if isinstance(error, OnnxPruneError) and not isinstance(error, BadDataError):
            raise
        raise PluginError(
            f"{what} '{spec}' failed{_place(error)}: {type(error).__name__}: {error}".rstrip(": ") + ".",
            "Correct this code.",
        ) from error


def _place(error: BaseException) -> str:
    """' at file.py:12': the innermost line of the user's own code, or else of the package that it called."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in reversed(traceback.extract_tb(error.__traceback__))
        if not frame.filename.startswith("<") and not Path(frame.filename).is_relative_to(_OWN_FOLDER)
    ]
    own = [frame for frame in frames if not _is_installed(Path(frame.filename))]
    return "".join(f" at {frame.filename}:{frame.lineno}" for frame in (own or frames)[:1])


def _is_installed(path: Path) -> bool:
    """True for the standard library and installed packages, where users can't correct anything."""
    return "site-packages" in path.parts or path.is_relative_to(Path(os.__file__).parent)


def _import_file(file: Path, spec: str, what: str) -> ModuleType:
    if not file.is_file():
        raise UsageError(f"{what} '{spec}': there is no file '{file}'.", "Check the path.")
    file = file.resolve()
    state = file.stat()
    # With time and size, so that a file that was edited since is imported anew.
    identity = hashlib.sha256(f"{file}|{state.st_mtime_ns}|{state.st_size}".encode()).hexdigest()[:12]
    name = f"_onnxprune_user_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}_{identity}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, file)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"{what} '{spec}': '{file}' can't be imported as Python code.", "Give a .py file.")
    module = importlib.util.module_from_spec(module_spec)
    _put_first_on_path(file.parent)
    # Before running it: dataclasses and pickle look their module up.
    sys.modules[name] = module
    try:
        with _fence(spec, what):
            module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(parsed: FunctionSpec, spec: str, what: str) -> ModuleType:
    _put_first_on_path(Path.cwd())
    importlib.invalidate_caches()
    try:
        found = importlib.util.find_spec(parsed.module.partition(".")[0])
    except (ImportError, ValueError):
        found = None
    if found is None and parsed.module.partition(".")[0] not in sys.modules:
        raise UsageError(
            f"{what} '{spec}': there is no module '{parsed.module}'.",
            "It must be installed, or lie in the working directory. A file is given as 'path/file.py:function'.",
        )
    with _fence(spec, what):
        return importlib.import_module(parsed.module)


def _put_first_on_path(folder: Path) -> None:
    entry = str(folder)
    if sys.path[:1] != [entry]:
        sys.path[:] = [entry, *(other for other in sys.path if other != entry)]
