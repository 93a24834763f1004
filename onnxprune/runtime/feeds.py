"""Seeded inputs for any model, for comparisons and timings where there are no data.

Values (one generator for each input, from the seed and the input's name, so another input changes nothing):
    floats      standard normal
    uint8/int8  the whole range where the rank is at least 3 (images, features), else 0 or 1
    other ints  0 or 1: valid indices into every table; 1 where the name says "mask", so that no row is masked whole
    bool        either; True where the name says "mask"
    strings     single letters

Sizes of dynamic dimensions, the first that applies:
    1. `shapes`, which also fixes a symbol wherever else it stands
    2. a symbol that was given a size before keeps it ("a + b" and "a + 1" are computed from their terms)
    3. axis 0, or a name that says "batch": `batch`
    4. 3 for the channel axis of an image whose height and width are known
    5. `free_size`: 64 by default, enough for a network that halves its maps six times
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Runner, TensorSpec, numpy_dtype
from onnxprune.errors import BadDataError, OnnxPruneError, UsageError, did_you_mean

__all__ = ["FREE_SIZES", "random_feeds", "resolve_shapes", "working_feeds"]

# Tried in this order by `working_feeds`: common image sides and sequence lengths.
FREE_SIZES = (64, 224, 32, 256, 16, 8, 320, 640, 1)

_MAX_FEED_ELEMENTS = 1 << 30
_SUM = re.compile(r"\s*\+\s*")


def random_feeds(
    specs: Sequence[TensorSpec],
    *,
    seed: int,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
    free_size: int = FREE_SIZES[0],
) -> dict[str, npt.NDArray[Any]]:
    """One array for each of `specs`; the same for the same arguments on every machine.

    Args:
        specs: A runner's inputs.
        seed: Where the values come from, together with the input's name.
        shapes: Full shapes by input name, for dynamic dimensions (see the top of this file for the rest).
        batch: Size of axis 0 where it is dynamic.
        free_size: Size of dimensions that nothing is known about.

    Raises:
        UsageError: `shapes` names an unknown input or contradicts a declared shape.
        BadDataError: An input would have more than 2**30 elements.
    """
    sizes = resolve_shapes(specs, shapes=shapes, batch=batch, free_size=free_size)
    return {spec.name: _values(spec, sizes[spec.name], seed) for spec in specs}


def working_feeds(
    runner: Runner, *, seed: int, shapes: Mapping[str, Sequence[int]] | None = None, batch: int = 1
) -> dict[str, npt.NDArray[Any]]:
    """Random feeds of sizes that `runner` really takes: `FREE_SIZES` are tried until one runs.

    Raises:
        OnnxPruneError: None of the sizes runs; this is the error of the first one.
    """
    first_error: OnnxPruneError | None = None
    tried: set[tuple[tuple[int, ...], ...]] = set()
    for free_size in FREE_SIZES:
        sizes = resolve_shapes(runner.inputs, shapes=shapes, batch=batch, free_size=free_size)
        key = tuple(sizes.values())
        if key in tried:
            continue
        tried.add(key)
        feeds = {spec.name: _values(spec, sizes[spec.name], seed) for spec in runner.inputs}
        try:
            runner.run(feeds)
        except OnnxPruneError as error:
            first_error = first_error or error
            continue
        return feeds
    assert first_error is not None, "FREE_SIZES is not empty"  # noqa: S101 - an invariant, not user input
    raise first_error


def resolve_shapes(
    specs: Sequence[TensorSpec],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
    free_size: int = FREE_SIZES[0],
) -> dict[str, tuple[int, ...]]:
    """A full shape for each of `specs`, by the rules at the top of this file. A shape of None becomes a scalar.

    Raises:
        UsageError: `shapes` names an unknown input or contradicts a declared shape.
    """
    given = {name: tuple(int(size) for size in shape) for name, shape in (shapes or {}).items()}
    by_name = {spec.name: spec for spec in specs}
    symbols: dict[str, int] = {}
    for name, shape in given.items():
        if name not in by_name:
            raise UsageError(f"A shape is given for '{name}', which is no input.", did_you_mean(name, list(by_name)))
        _bind(by_name[name], shape, symbols)
    # Plain symbols first: the sums of the next loop are made of them.
    for spec in specs:
        for axis, dim in enumerate(spec.shape or ()):
            if isinstance(dim, str) and not _SUM.search(dim):
                symbols.setdefault(dim, _default_size(spec, axis, batch, free_size))
    return {
        spec.name: given.get(spec.name)
        or tuple(
            _size(spec, axis, dim, symbols, batch=batch, free_size=free_size)
            for axis, dim in enumerate(spec.shape or ())
        )
        for spec in specs
    }


def _bind(spec: TensorSpec, shape: tuple[int, ...], symbols: dict[str, int]) -> None:
    declared = spec.shape
    if declared is None:
        return
    fits = len(declared) == len(shape) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(declared, shape, strict=True)
    )
    if not fits or any(size < 1 for size, dim in zip(shape, declared, strict=True) if size != dim):
        text = "x".join("?" if dim is None else str(dim) for dim in declared)
        raise UsageError(
            f"The shape {'x'.join(map(str, shape))} does not fit input '{spec.name}', which is declared as {text}."
        )
    for dim, size in zip(declared, shape, strict=True):
        if isinstance(dim, str):
            symbols.setdefault(dim, size)


def _size(
    spec: TensorSpec, axis: int, dim: int | str | None, symbols: dict[str, int], *, batch: int, free_size: int
) -> int:
    if isinstance(dim, int):
        return dim
    if dim is None:
        return _default_size(spec, axis, batch, free_size)
    if dim not in symbols:
        terms = [int(term) if term.isdigit() else symbols.get(term) for term in _SUM.split(dim.strip())]
        known = [term for term in terms if term is not None]
        is_sum = len(known) == len(terms) and len(terms) > 1
        symbols[dim] = sum(known) if is_sum else _default_size(spec, axis, batch, free_size)
    return symbols[dim]


def _default_size(spec: TensorSpec, axis: int, batch: int, free_size: int) -> int:
    shape = spec.shape or ()
    name = shape[axis]
    if axis == 0 or (isinstance(name, str) and "batch" in name.lower()):
        return batch
    others = [dim for other, dim in enumerate(shape) if other not in (0, axis)]
    is_image = len(shape) == 4 and all(isinstance(dim, int) for dim in others)
    return 3 if is_image and axis in (1, 3) and min(d for d in others if isinstance(d, int)) > 4 else free_size


def _values(spec: TensorSpec, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    if int(np.prod(shape, dtype=object)) > _MAX_FEED_ELEMENTS:
        raise BadDataError(
            f"Input '{spec.name}' of shape {'x'.join(map(str, shape))} has more than 2**30 elements.",
            "Fix smaller sizes with --shape.",
        )
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    is_mask = "mask" in spec.name.lower()
    dtype = numpy_dtype(spec.dtype)
    match dtype.kind:
        case "O":
            return rng.choice(np.array(list("abcdefgh"), dtype=object), size=shape).reshape(shape)
        case "b":
            return np.ones(shape, bool) if is_mask else rng.integers(0, 2, size=shape).astype(bool)
        case "i" | "u" if is_mask:
            return np.ones(shape, dtype)
        case "i" | "u" if dtype.itemsize == 1 and len(shape) >= 3:
            limits = np.iinfo(dtype)
            return rng.integers(limits.min, int(limits.max) + 1, size=shape).astype(dtype)
        case "i" | "u":
            return rng.integers(0, 2, size=shape).astype(dtype)
        case _:
            return rng.standard_normal(shape).astype(dtype)
