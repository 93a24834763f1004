"""Says plainly when a result is not what the user wanted: larger, slower, or zeros taken for savings."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from onnxprune.contracts import Artifact, Measurements, ModelFigures
from onnxprune.errors import quoted_list
from onnxprune.targets.building import NOTABLE_ZEROS_RATIO
from onnxprune.targets.tflite.sparse import SPARSE_TOPIC

__all__ = ["result_warnings", "sparse_targets"]

NOTABLE_SLOWDOWN = 0.98  # of a speed-up whose whole interval lies below: within 2 % nobody feels a difference


def result_warnings(
    before: ModelFigures,
    after: ModelFigures,
    source: Measurements,
    measurements: Sequence[Measurements],
    *,
    sparse_targets: Collection[str] = (),
) -> tuple[str, ...]:
    """One sentence for each way in which an artifact is worse than the source, or its figures mislead.

    `sparse_targets`: see the function of that name.
    """
    warnings = []
    for measured in measurements:
        if measured.size_bytes > source.size_bytes * 1.01:
            warnings.append(
                f"{measured.target}: the artifact is larger than the source "
                f"({measured.size_bytes:,} against {source.size_bytes:,} bytes)."
            )
        if measured.fidelity is not None and not measured.fidelity.difference.is_compared:
            difference = measured.fidelity.difference
            named = [name for name, one in difference.per_output.items() if not one.is_compared]
            which = f"output {quoted_list(named)} is" if named else "an output is"
            warnings.append(
                f"{measured.target}: {which} NaN or infinite throughout, in source and artifact, so nothing was "
                "compared there. Look at the model and at the samples."
            )
        latency = measured.latency
        # A time that was taken elsewhere says nothing about the target; the report says that instead.
        if latency is not None and measured.latency_on_target and latency.high < NOTABLE_SLOWDOWN:
            warnings.append(
                f"{measured.target}: the artifact is slower than the source on its target: {1 / latency.ratio:.2f}x "
                f"its latency (95 % interval {1 / latency.high:.2f} to {1 / latency.low:.2f})."
            )
    zeros = after.parameters - after.nonzero_parameters
    zeros_before = before.parameters - before.nonzero_parameters
    dense_targets = [measured.target for measured in measurements if measured.target not in sparse_targets]
    is_notable = zeros > zeros_before and zeros >= NOTABLE_ZEROS_RATIO * after.parameters
    if is_notable and after.sparse_bytes and (dense_targets or not measurements):
        storage, smallest = min(after.sparse_bytes.items(), key=lambda item: item[1])
        warnings.append(
            f"{', '.join(dense_targets) + ': ' if sparse_targets else ''}"
            f"{zeros / after.parameters:.0%} of the weights are zeros, but they are stored and computed like any other "
            f"number: neither the file nor the latency gains. As sparse storage ({storage}) the weights would take "
            f"{smallest:,} bytes instead of {after.weight_bytes:,}. To gain speed, remove channels (pass 'prune')."
        )
    return tuple(warnings)


def sparse_targets(artifacts: Sequence[Artifact]) -> frozenset[str]:
    """Targets whose artifacts say themselves what zeros are worth there."""
    return frozenset(
        artifact.target for artifact in artifacts if any(finding.topic == SPARSE_TOPIC for finding in artifact.findings)
    )
