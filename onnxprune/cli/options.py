"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from onnxprune.convert.request import SourceRequest
from onnxprune.errors import UsageError

__all__ = ["json_option", "source_options", "sources_options", "verbosity_options"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

READING_OPTIONS = (
    click.option(
        "--weights",
        type=click.Path(path_type=Path),
        help="State dict (.pth, .safetensors) for a factory 'file.py:function' or 'package.module:function'.",
    ),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        metavar="INPUT=1,3,224,224",
        help="Fix an input's dynamic axes; repeatable.",
    ),
    click.option("--signature", help="SavedModel signature to convert (default: serving_default)."),
    click.option("--inputs", metavar="A:0,B:0", help="Input tensors of a frozen .pb graph."),
    click.option("--outputs", metavar="C:0", help="Output tensors of a frozen .pb graph."),
    click.option(
        "--trust-source",
        is_flag=True,
        help="Load a source that can run code of its own (.pt2, .keras with Lambda). Only for files you made.",
    ),
    click.option(
        "--custom-op-library",
        "custom_op_libraries",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Shared library with custom ONNX Runtime operators; repeatable.",
    ),
)


def source_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the SOURCE argument and the options that say how to read it; the command gets them as one `request`."""

    @functools.wraps(function)
    def with_request(*, source: str, **options: Any) -> None:
        (request,), others = _requests((source,), **options)
        function(request=request, **others)

    return _decorated(with_request, click.argument("source"))


def sources_options(function: Callable[..., None]) -> Callable[..., None]:
    """Like `source_options` for one or several SOURCEs, which are all read in one way: the command gets `requests`."""

    @functools.wraps(function)
    def with_requests(*, sources: tuple[str, ...], **options: Any) -> None:
        requests, others = _requests(sources, **options)
        if len(requests) > 1 and requests[0].weights is not None:
            raise UsageError(
                "'--weights' belongs to one model, and several are given.", "Run the factories one by one."
            )
        function(requests=requests, **others)

    return _decorated(with_requests, click.argument("sources", metavar="SOURCE...", nargs=-1, required=True))


def _decorated(function: Callable[..., None], argument: Callable[..., Any]) -> Callable[..., None]:
    decorated: Callable[..., None] = function
    for option in reversed((argument, *READING_OPTIONS)):
        decorated = option(decorated)
    return decorated


def _requests(
    sources: tuple[str, ...],
    *,
    weights: Path | None,
    shapes: tuple[str, ...],
    signature: str | None,
    inputs: str | None,
    outputs: str | None,
    trust_source: bool,
    custom_op_libraries: tuple[Path, ...],
    **others: Any,
) -> tuple[tuple[SourceRequest, ...], dict[str, Any]]:
    """One request for each source, and the options that are not about reading."""
    requests = tuple(
        SourceRequest(
            source=source,
            weights=weights,
            shapes=dict(_parse_shape(text) for text in shapes),
            signature=signature,
            inputs=tuple(inputs.split(",")) if inputs else (),
            outputs=tuple(outputs.split(",")) if outputs else (),
            trust_source=trust_source,
            custom_op_libraries=custom_op_libraries,
        )
        for source in sources
    )
    return requests, others


def verbosity_options(function: FunctionT) -> FunctionT:
    """Add -v and -q."""
    function = click.option("-q", "--quiet", is_flag=True, help="Results and errors only.")(function)
    return click.option("-v", "--verbose", count=True, help="Say more (-vv: everything).")(function)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")


def _parse_shape(text: str) -> tuple[str, tuple[int | str, ...]]:
    name, equals, dims = text.rpartition("=")
    parts = [part.strip() for part in dims.split(",")]
    if not equals or not name or not all(_is_dimension(part) for part in parts):
        raise UsageError(
            f"Shape '{text}' can't be read.",
            "Write: --shape input=1,3,224,224 (a name instead of a number keeps an axis dynamic).",
        )
    return name, tuple(int(part) if part.isdigit() else part for part in parts)


def _is_dimension(text: str) -> bool:
    return int(text) > 0 if text.isdigit() else text.isidentifier()
