"""How far a model's outputs are from those of the original.

With reference r and actual a, each output taken as one vector:

    max_abs   max |a - r|
    max_rel   max |a - r| / max |r|              0 where both are zero throughout
    cosine    <r, a> / (|r| |a|)                 1 where both are zero throughout, 0 where one is
    snr_db    10 log10(sum r^2 / sum (a - r)^2)  infinite where equal

Values that are not finite count as equal where both have the same one at the same place; where there is no other, the
result says that nothing was compared. Where they differ, max_abs
and max_rel are infinite, cosine is 0 and snr_db is minus infinity. Booleans are 0 and 1; strings are equal or not.
Over several outputs or batches the worst counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Batch, OutputDifference, Runner, TensorSpec
from onnxprune.data.fit import is_float, shape_text
from onnxprune.errors import BadDataError, VerificationError, quoted_list
from onnxprune.evaluate.feeds import feeds_for

__all__ = ["compare_outputs", "fidelity", "worst_of"]

_EQUAL = OutputDifference(max_abs=0.0, max_rel=0.0, cosine=1.0, snr_db=math.inf)
_NOT_COMPARED = replace(_EQUAL, is_compared=False)


def compare_outputs(
    reference: Mapping[str, npt.NDArray[Any]],
    actual: Mapping[str, npt.NDArray[Any]],
    *,
    varying: Collection[str] = (),
) -> OutputDifference:
    """The difference of every output, and the worst of them.

    Args:
        reference: Outputs by name.
        actual: The same names; may hold further ones, which are not looked at.
        varying: Outputs whose length depends on the values, such as detections. Where lengths differ, both are filled
            with zeros to the longer one: what is missing counts with its full size.

    Raises:
        VerificationError: An output is missing, has another shape, or is of another kind of type (other widths of
            floats are fine).
    """
    missing = [name for name in reference if name not in actual]
    if missing:
        raise VerificationError(f"The model has no output {quoted_list(missing)} any more.")
    per_output = {name: _difference(name, reference[name], actual[name], name in varying) for name in reference}
    return worst_of(per_output.values(), per_output=per_output)


def worst_of(
    differences: Iterable[OutputDifference], *, per_output: Mapping[str, OutputDifference] | None = None
) -> OutputDifference:
    """The largest errors, lowest cosine and lowest SNR among `differences`; without any, no difference."""
    worst = list(differences) or [_EQUAL]
    return OutputDifference(
        max_abs=max(one.max_abs for one in worst),
        max_rel=max(one.max_rel for one in worst),
        cosine=min(one.cosine for one in worst),
        snr_db=min(one.snr_db for one in worst),
        is_compared=all(one.is_compared for one in worst),
        per_output=dict(per_output or {}),
    )


def fidelity(reference: Runner, actual: Runner, batches: Iterable[Batch]) -> OutputDifference:
    """The worst difference over all batches, for each output and overall.

    Outputs with a dynamic axis may have other lengths in `actual` (see `compare_outputs`).

    Raises:
        BadDataError: There are no batches.
        VerificationError: As in `compare_outputs`.
    """
    varying = {spec.name for spec in reference.outputs if _varies(spec)}
    worst: dict[str, OutputDifference] = {}
    for batch in batches:
        expected = reference.run(feeds_for(reference.inputs, batch))
        found = actual.run(feeds_for(actual.inputs, batch))
        difference = compare_outputs(expected, found, varying=varying)
        for name, one in difference.per_output.items():
            worst[name] = worst_of([one, worst[name]]) if name in worst else one
    if not worst:
        raise BadDataError("There are no samples to compare outputs on.", "Give calibration data, or none at all.")
    return worst_of(worst.values(), per_output=worst)


def _varies(spec: TensorSpec) -> bool:
    return spec.shape is None or any(not isinstance(dim, int) for dim in spec.shape)


def _difference(
    name: str,
    reference: npt.NDArray[Any],
    actual: npt.NDArray[Any],
    may_vary: bool,  # noqa: FBT001 - private
) -> OutputDifference:
    reference, actual = np.asarray(reference), np.asarray(actual)
    if _kind(reference) != _kind(actual):
        raise VerificationError(f"Output '{name}' is {actual.dtype}, but was {reference.dtype}.")
    if reference.shape != actual.shape:
        if not may_vary or reference.ndim != actual.ndim:
            raise VerificationError(
                f"Output '{name}' has the shape {shape_text(actual.shape)}, but had {shape_text(reference.shape)}."
            )
        shape = tuple(map(max, reference.shape, actual.shape))
        reference, actual = _filled(reference, shape), _filled(actual, shape)
    if reference.dtype.kind in "OUST":
        equal = reference.ravel() == actual.ravel()
        return _vector_difference(np.ones(equal.size), np.asarray(equal, dtype=np.float64))
    return _vector_difference(_vector(reference), _vector(actual))


def _kind(array: npt.NDArray[Any]) -> str:
    if is_float(array.dtype):
        return "float"
    return {"i": "integer", "u": "integer", "b": "bool", "O": "text", "U": "text", "S": "text", "T": "text"}.get(
        array.dtype.kind, array.dtype.name
    )


def _filled(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    filled = np.full(shape, "", dtype=object) if array.dtype.kind in "OUST" else np.zeros(shape, dtype=array.dtype)
    filled[tuple(slice(size) for size in array.shape)] = array
    return filled


def _vector(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return array.astype(np.float64).ravel()


def _vector_difference(r: npt.NDArray[np.float64], a: npt.NDArray[np.float64]) -> OutputDifference:
    finite = np.isfinite(r) & np.isfinite(a)
    if not finite.all():
        odd_r, odd_a = r[~finite], a[~finite]
        if not np.array_equal(odd_r, odd_a, equal_nan=True):
            return OutputDifference(max_abs=math.inf, max_rel=math.inf, cosine=0.0, snr_db=-math.inf)
        if not finite.any():
            return _NOT_COMPARED
        r, a = r[finite], a[finite]
    if r.size == 0 or np.array_equal(r, a):
        return _EQUAL
    largest_r = float(np.abs(r).max())
    # Squares of very large or small values would overflow or vanish; a power of two changes no digit.
    exponent = math.frexp(max(largest_r, float(np.abs(a).max())))[1]
    factor = math.ldexp(1.0, min(-exponent, 1000))
    r, a = r * factor, a * factor
    error = a - r
    max_abs = float(np.abs(error).max()) / factor
    error_power, power_r, power_a = float(error @ error), float(r @ r), float(a @ a)
    norms = math.sqrt(power_r) * math.sqrt(power_a)
    return OutputDifference(
        max_abs=max_abs,
        max_rel=max_abs / largest_r if largest_r else math.inf,
        cosine=min(1.0, max(-1.0, float(r @ a) / norms)) if norms else 0.0,
        snr_db=_decibel(power_r, error_power),
    )


def _decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf
