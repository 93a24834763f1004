"""Source against result on the same inputs, in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import CanonicalModel, OutputDifference, Runner
from onnxprune.convert.reference import ForeignConversion, ReferenceCase
from onnxprune.convert.request import SourceRequest
from onnxprune.convert.shapes import tensor_specs
from onnxprune.convert.upgrade import TOLERANCE as UPGRADE_TOLERANCE
from onnxprune.convert.upgrade import UpgradeReport
from onnxprune.errors import ModelError, OnnxPruneError, quoted_list
from onnxprune.evaluate.fidelity import compare_outputs
from onnxprune.graph.io import external_data_files
from onnxprune.runtime.feeds import resolve_shapes, working_feeds
from onnxprune.runtime.sessions import ort_runner_from_model, ort_runner_from_path

__all__ = ["Comparison", "compare_with_cases", "compare_with_file"]

# Comparing holds the model three times in memory; above this size an ONNX file is taken as it is (opset upgrades are
# compared by `load_onnx` in any case).
_MAX_COMPARED_BYTES = 512 << 20
# Integer kernels round intermediate results in their own ways, and a deep network amplifies it: on 8-bit ResNet-8, 0.05
# to 0.14 of the outputs' spread between TFLite and tf2onnx's graph, with the same top class on all real images. A
# shift by one pixel, as wrong padding makes it, gives 0.38 and more.
_QUANTIZED_TOLERANCE = 0.25
# Where every value of an output is zero in the source, any difference would be infinitely large in relation to it.
_ABSOLUTE_FLOOR = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The worst difference over all comparisons, or why there was none.

    `allowed` is the limit that was held: of a quantized source's noise ratio, else of `difference.max_rel`.
    """

    difference: OutputDifference | None
    allowed: float
    not_compared_reason: str = ""
    num_comparisons: int = 0
    shape_used: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def compare_with_file(
    path: Path, model: CanonicalModel, request: SourceRequest, *, upgrade: UpgradeReport | None
) -> Comparison:
    """Compare `model` with the ONNX file that it was read from, unless its upgrade was compared already.

    Raises:
        ModelError: They differ by more than the tolerance.
    """
    if upgrade is not None and upgrade.difference is not None and not request.shapes:
        shape_used = resolve_shapes(tensor_specs(model.graph.inputs))
        return Comparison(
            difference=upgrade.difference, allowed=UPGRADE_TOLERANCE, num_comparisons=1, shape_used=shape_used
        )
    size_bytes = path.stat().st_size + sum(file.stat().st_size for file in external_data_files(path))
    if size_bytes > _MAX_COMPARED_BYTES:
        return Comparison(
            difference=None,
            allowed=request.tolerance,
            not_compared_reason=f"it has more than {_MAX_COMPARED_BYTES >> 20} MiB",
        )
    libraries = request.custom_op_libraries
    result = _runner(model, request)
    feeds = working_feeds(result, seed=request.seed)
    try:
        source: Runner = ort_runner_from_path(path, custom_op_libraries=libraries, optimization="disabled")
        outputs = source.run(feeds)
    except OnnxPruneError as error:
        return Comparison(
            difference=None,
            allowed=request.tolerance,
            not_compared_reason=f"ONNX Runtime does not run the source itself ({error.message})",
            shape_used={name: array.shape for name, array in feeds.items()},
        )
    conversion = ForeignConversion(cases=(ReferenceCase(feeds=feeds, outputs=outputs),))
    return _compare(result, conversion, request, source_name=path.name)


def compare_with_cases(
    model: CanonicalModel, conversion: ForeignConversion, request: SourceRequest, *, source_name: str
) -> Comparison:
    """Compare `model` with what its source answered.

    Raises:
        ModelError: They differ by more than the tolerance, or the result can't run what the source could.
    """
    if not conversion.cases:
        return Comparison(
            difference=None, allowed=request.tolerance, not_compared_reason=conversion.not_compared_reason
        )
    return _compare(_runner(model, request), conversion, request, source_name=source_name)


def _runner(model: CanonicalModel, request: SourceRequest) -> Runner:
    # Without ONNX Runtime's own rewriting: the graph itself is what is compared.
    return ort_runner_from_model(model, custom_op_libraries=request.custom_op_libraries, optimization="disabled")


def _compare(result: Runner, conversion: ForeignConversion, request: SourceRequest, *, source_name: str) -> Comparison:
    answers = [_run(case, result, source_name) for case in conversion.cases]
    differences = [
        compare_outputs(case.outputs, answer) for case, answer in zip(conversion.cases, answers, strict=True)
    ]
    notes: tuple[str, ...] = ()
    if conversion.is_quantized:
        ratios = {
            name: _noise_ratio([case.outputs[name] for case in conversion.cases], [answer[name] for answer in answers])
            for name in conversion.cases[0].outputs
        }
        allowed = max(request.tolerance, _QUANTIZED_TOLERANCE)
        failing = [f"'{name}' by {ratio:.3g} of its spread" for name, ratio in ratios.items() if not ratio <= allowed]
        note = (
            "The source is quantized, and runtimes round integers differently: the outputs' root mean square "
            f"difference is {max(ratios.values()):.2g} of their spread (allowed {allowed:g})."
        )
        notes = (note,)
    else:
        allowed = request.tolerance
        failing = [
            f"'{name}' by {one.max_abs:.3g} (relative {one.max_rel:.3g}, input {_shapes(case)})"
            for case, difference in zip(conversion.cases, differences, strict=True)
            for name, one in difference.per_output.items()
            if not _is_within(one, allowed)
        ]
    if failing:
        reason = "" if conversion.is_deterministic else " The source itself gives other outputs each time it is run."
        raise ModelError(
            f"'{source_name}' and its conversion differ on the same inputs: {', '.join(failing[:5])}; "
            f"allowed is {allowed:g}.{reason}",
            "Report it with the model, or raise the tolerance if the difference is known and harmless.",
        )
    return Comparison(
        difference=functools.reduce(_worse, differences),
        allowed=allowed,
        num_comparisons=len(conversion.cases),
        shape_used={name: array.shape for name, array in conversion.cases[0].feeds.items()},
        notes=notes,
    )


def _shapes(case: ReferenceCase) -> str:
    return ", ".join("x".join(map(str, array.shape)) for array in case.feeds.values())


def _noise_ratio(reference: Sequence[npt.NDArray[Any]], actual: Sequence[npt.NDArray[Any]]) -> float:
    """Root mean square difference over the standard deviation of the reference, over all samples together."""
    expected = np.concatenate([array.astype(np.float64).ravel() for array in reference])
    difference = np.concatenate([array.astype(np.float64).ravel() for array in actual]) - expected
    noise, spread = float(np.sqrt(np.mean(difference**2))), float(np.std(expected))
    if spread == 0.0:
        # Outputs that are the same for every sample: a step of the integers is all that may differ.
        return 0.0 if np.abs(difference).max(initial=0.0) <= 1.0 else math.inf
    return noise / spread


def _run(case: ReferenceCase, result: Runner, source_name: str) -> dict[str, npt.NDArray[Any]]:
    try:
        outputs = result.run(case.feeds)
    except OnnxPruneError as error:
        raise ModelError(
            f"'{source_name}' was converted, but ONNX Runtime can't run the result: {error.message}", error.hint
        ) from error
    missing = [name for name in case.outputs if name not in outputs]
    if missing:
        raise ModelError(f"The conversion of '{source_name}' lost the outputs {quoted_list(missing)}.")
    for name, array in case.outputs.items():
        if array.shape != outputs[name].shape:
            raise ModelError(
                f"'{source_name}' and its conversion differ: output '{name}' has the shape {array.shape} in the source "
                f"and {outputs[name].shape} in the result."
            )
    return {name: outputs[name] for name in case.outputs}


def _is_within(difference: OutputDifference, tolerance: float) -> bool:
    # NaN compares as False, and so fails.
    return difference.max_rel <= tolerance or difference.max_abs <= _ABSOLUTE_FLOOR


def _worse(one: OutputDifference, other: OutputDifference) -> OutputDifference:
    """Output by output the larger difference of two comparisons."""

    def merged(a: OutputDifference, b: OutputDifference) -> OutputDifference:
        return OutputDifference(
            max_abs=_largest(a.max_abs, b.max_abs),
            max_rel=_largest(a.max_rel, b.max_rel),
            cosine=min(a.cosine, b.cosine),
            snr_db=min(a.snr_db, b.snr_db),
            is_compared=a.is_compared and b.is_compared,
        )

    return dataclasses.replace(
        merged(one, other),
        per_output={name: merged(value, other.per_output[name]) for name, value in one.per_output.items()},
    )


def _largest(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
