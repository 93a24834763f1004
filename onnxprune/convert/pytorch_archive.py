"""Whether a `.pt2` file (an ExportedProgram) is data only. Torch is not needed for that, and nothing is run.

`torch.export.load` of torch 2.13 runs code that a crafted file brings along in six ways; each is closed here:

1. pickles: sample inputs, weights and constants fall back to the unrestricted unpickler. Every member that could be
   read as a pickle is listed, and must load with `weights_only=True` first (done by the caller, which has torch).
2. objects: members named `custom_obj_*` and `opaque_obj_*` are always unpickled without restriction.
3. machine code: whatever lies under `data/aotinductor/` is opened as a shared library.
4. symbolic sizes are evaluated as Python by `sympy.sympify`, shape guards are compiled and executed as Python.
5. operator names are looked up as attributes of `torch`, from where `torch.os.system` is in reach.
6. names end in generated Python source, some of them unescaped; pytree contexts can import modules.

The members are then copied one by one into a fresh archive, which is what torch gets to see: two readers of zip files
may disagree about what a crafted archive holds.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxprune.errors import ModelError

__all__ = ["check_exported_archive", "copy_archive", "is_harmless_expression", "read_extra_texts"]

# torch.export.save stores its members uncompressed.
_MAX_EXPANSION = 16
_MAX_SLACK_BYTES = 16 << 20
_MAX_TEXT_BYTES = 1 << 20

_OPERATOR = re.compile(r"torch\.ops\.[A-Za-z]\w*\.(?P<name>\w+)(\.[A-Za-z]\w*)?")
_DUNDER_OPERATORS = frozenset({"__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "__iand__", "__ior__"})
_FILE_OPERATORS = frozenset({"from_file", "save", "load"})
_SYMBOLIC_FUNCTION = re.compile(r"torch\.(_sym_\w+|sym_(int|float|not|max|min|ite|sum|fresh_size))")
_PYTHON_OPERATOR = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|lshift|rshift|"
    r"getitem|iadd|isub|imul)"
)
_MATH_FUNCTION = re.compile(r"math\.(ceil|floor|trunc|sqrt|pow|log|log2|exp|sin|cos|tan|tanh|fabs)")
# Free text, which goes into comments and metadata and is never evaluated.
_TEXT_KEYS = frozenset({"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "as_string", "as_strings"})
_TREE_KEYS = frozenset({"in_spec", "out_spec"})
_UNSAFE_IN_NAMES = re.compile(r"[\"'\\\x00-\x1f\x7f`#]")

# What sympy and torch.utils._sympy print for sizes; `Symbol` and the number classes take a string, see below.
_EXPRESSION_FUNCTIONS = frozenset({
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "floor", "ceiling",
    "sqrt", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan",
    "StrictGreaterThan", "And", "Or", "Not", "Piecewise", "ITE", "Tuple", "FloorDiv", "ModularIndexing", "Where",
    "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow",
    "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt",
    "RoundDecimal", "ToFloat", "Identity",
})  # fmt: skip
_GUARD_METHODS = frozenset({"size", "stride", "dim", "storage_offset", "numel"})
_EXPRESSION_NODES = (
    ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Call, ast.keyword, ast.Constant,
    ast.Name, ast.Load, ast.Subscript, ast.Tuple, ast.Attribute, ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip
_SYMBOL_NAME = re.compile(r"[A-Za-z_]\w{0,63}")


def check_exported_archive(path: Path) -> tuple[str, ...]:
    """Check everything of `path` that can be checked without torch.

    Returns:
        The members that torch could read as pickles, which are still to be proven harmless.

    Raises:
        ModelError: It is damaged, or could run code; names the member and what it would do.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            documents = {
                info.filename: json.loads(archive.read(info))
                for info in archive.infolist()
                if info.filename.endswith(".json")
            }
            for name, document in documents.items():
                _check_document(path, name, document)
            return tuple(_pickle_members(archive, documents))
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RecursionError, NotImplementedError) as error:
        raise ModelError(
            f"Source '{path}' is damaged: {error or type(error).__name__}.", "Copy it again, or save it anew."
        ) from error


def copy_archive(path: Path, destination: Path) -> None:
    """Write the members of `path`, as Python's reader sees them, into a fresh archive."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(destination, "w", zipfile.ZIP_STORED) as target:
        for info in source.infolist():
            with source.open(info) as reader, target.open(info.filename, "w", force_zip64=True) as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)


def _inner(name: str) -> str:
    """A member's name without the folder that torch puts everything into (the file's stem)."""
    return name.partition("/")[2] or name


def _refusal(path: Path, member: str, reason: str) -> ModelError:
    return ModelError(
        f"Source '{path}' is refused: '{member}' {reason}.",
        "Export the model again yourself, or give --trust-source if you trust whoever made the file.",
    )


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    infos = archive.infolist()
    names = [info.filename for info in infos]
    for name in names:
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or not name.isprintable():
            raise _refusal(path, ascii(name)[1:-1], "is not a plain relative name and would be written elsewhere")
        if names.count(name) > 1:
            raise _refusal(path, name, "is there twice, so that two readers may see different contents")
        inner = _inner(name)
        if inner.startswith("data/aotinductor/"):
            raise _refusal(path, name, "is compiled machine code, which PyTorch would load and run")
        if inner.rpartition("/")[2].startswith(("custom_obj_", "opaque_obj_")):
            raise _refusal(path, name, "is a pickled object, which PyTorch would build by running its code")
    if any(info.flag_bits & 1 for info in infos):
        raise _refusal(path, names[0], "is encrypted")
    total_bytes = sum(info.file_size for info in infos)
    if total_bytes > _MAX_EXPANSION * path.stat().st_size + _MAX_SLACK_BYTES:
        raise _refusal(
            path,
            max(infos, key=lambda info: info.file_size).filename,
            f"unpacks to far more than the file ({total_bytes:,} bytes in all)",
        )


def _pickle_members(archive: zipfile.ZipFile, documents: dict[str, Any]) -> Iterator[str]:
    """Every member that torch could read as a pickle: all but JSON, short texts and raw weights."""
    raw_payloads: set[str] = set()
    for name, document in documents.items():
        if not (name.endswith("_config.json") and isinstance(document, dict)):
            continue
        folder = name.rpartition("/")[0]
        entries = document.get("config")
        entries = [entry for entry in entries.values() if isinstance(entry, dict)] if isinstance(entries, dict) else []
        pickled = {entry.get("path_name") for entry in entries if entry.get("use_pickle") is not False}
        raw_payloads |= {
            f"{folder}/{entry['path_name']}"
            for entry in entries
            if isinstance(entry.get("path_name"), str) and entry["path_name"] not in pickled
        }
    texts = ("archive_format", "archive_version", "byteorder", "version", ".data/version", ".data/serialization_id")
    for info in archive.infolist():
        inner = _inner(info.filename)
        is_text = inner in texts or inner.startswith(("extra/", "extra_files/")) or info.filename in texts
        if info.is_dir() or info.file_size == 0 or is_text or info.filename in documents:
            continue
        if info.filename not in raw_payloads:
            yield info.filename


def read_extra_texts(path: Path) -> dict[str, str]:
    """Texts that the author gave to `torch.export.save(..., extra_files=...)`: labels and the like."""
    texts = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            for prefix in ("extra/", "extra_files/"):
                name = info.filename if info.filename.startswith(prefix) else _inner(info.filename)
                if name.startswith(prefix) and not info.is_dir() and info.file_size <= _MAX_TEXT_BYTES:
                    with contextlib.suppress(UnicodeDecodeError):
                        texts[name.removeprefix(prefix)] = archive.read(info).decode("utf-8")
    return texts


def _check_document(path: Path, member: str, document: Any) -> None:
    """Check every string of a JSON document by the key it stands under."""
    pending: list[tuple[str, Any]] = [("", document)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            for name, child in value.items():
                if _UNSAFE_IN_NAMES.search(name):
                    raise _refusal(path, member, f"has the name {name[:80]!r}, which would end in generated code")
                # Metadata of nodes are dictionaries of free text.
                pending.append((name, child))
        elif isinstance(value, list):
            pending.extend((key, child) for child in value)
        elif isinstance(value, str):
            reason = _reason_to_refuse(key, value)
            if reason:
                raise _refusal(path, member, reason)


def _reason_to_refuse(key: str, text: str) -> str:
    if "__enum__" in text or "default_factory" in text:
        return f"would import a module by name ({text[:80]!r})"
    if key in _TEXT_KEYS or key in _TREE_KEYS:
        return ""
    if key == "expr_str" and not is_harmless_expression(text):
        return f"has the size expression {text[:80]!r}, which PyTorch would run as Python"
    if key == "guards_code" and not is_harmless_expression(text):
        return f"has the guard {text[:80]!r}, which PyTorch would run as Python"
    if key in ("expr_str", "guards_code"):
        return ""
    if key == "target" and not _is_harmless_operator(text):
        return f"calls {text[:80]!r}, which is not an operator of a network"
    return f"has the name {text[:80]!r}, which would end in generated code" if _UNSAFE_IN_NAMES.search(text) else ""


def _is_harmless_operator(target: str) -> bool:
    operator = _OPERATOR.fullmatch(target)
    if operator is None:
        patterns = (_SYMBOLIC_FUNCTION, _PYTHON_OPERATOR, _MATH_FUNCTION)
        return any(pattern.fullmatch(target) for pattern in patterns)
    name = operator["name"]
    if name.startswith("__"):
        return name in _DUNDER_OPERATORS
    return name not in _FILE_OPERATORS


def is_harmless_expression(text: str) -> bool:
    """True for arithmetic on sizes: numbers, symbols, known functions, and the size methods of shape guards."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _is_harmless(tree)


def _is_harmless(tree: ast.AST) -> bool:
    # Strings are allowed where they are names only: sympify evaluates any other string it meets.
    allowed_strings: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, _EXPRESSION_NODES):
            return False
        if isinstance(node, ast.Name) and node.id.startswith("__"):
            return False
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                if node.func.id not in _EXPRESSION_FUNCTIONS:
                    return False
                is_allowed = {"Symbol": _is_symbol_name, "Float": _is_number, "Integer": _is_number}.get(node.func.id)
                if is_allowed is not None and node.args and is_allowed(node.args[0]):
                    allowed_strings.add(id(node.args[0]))
            elif not isinstance(node.func, ast.Attribute):
                return False
        elif isinstance(node, ast.Attribute):
            if node.attr not in _GUARD_METHODS and node.attr != "shape":
                return False
        elif isinstance(node, ast.Subscript) and _is_symbol_name(node.slice):
            allowed_strings.add(id(node.slice))
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                if id(node) not in allowed_strings:
                    return False
            elif not isinstance(node.value, int | float | bool):
                return False
    return True


def _is_symbol_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(_SYMBOL_NAME.fullmatch(node.value))


def _is_number(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        return False
    try:
        float(node.value)
    except ValueError:
        return False
    return True
