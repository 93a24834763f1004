"""The same samples in calibration and evaluation make a score look better than it is: they are found by hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from onnxprune.contracts import CalibrationSource, Evaluator

__all__ = ["HashedSamples", "num_shared_samples", "overlap_warning"]


@runtime_checkable
class HashedSamples(Protocol):
    """A source that tells its samples apart. Methods, because `isinstance` would evaluate properties."""

    def sample_hashes(self) -> Sequence[str]:
        """sha256 of each sample as it is fed."""
        ...

    def file_digests(self) -> Sequence[str] | None:
        """sha256 of each sample's file; None where samples are not files of their own."""
        ...


def num_shared_samples(one: HashedSamples, other: HashedSamples) -> int:
    """How many different samples are in both.

    Where every sample of both is a file, files are compared, which needs no decoding; else samples as they are fed.
    """
    files, other_files = one.file_digests(), other.file_digests()
    if files is not None and other_files is not None:
        return len(set(files) & set(other_files))
    return len(set(one.sample_hashes()) & set(other.sample_hashes()))


def overlap_warning(calibration: CalibrationSource | None, evaluator: Evaluator | None) -> str:
    """One sentence where calibration and evaluation share samples, else "".

    Only evaluators that show their samples (an attribute `samples`) can be looked at; a function can't.
    """
    samples: object = getattr(evaluator, "samples", None)
    calibrated: object = calibration
    if not isinstance(calibrated, HashedSamples) or not isinstance(samples, HashedSamples):
        return ""
    shared = num_shared_samples(calibrated, samples)
    if shared == 0:
        return ""
    subject = "1 sample is" if shared == 1 else f"{shared} samples are"
    return (
        f"{subject} in both the calibration and the evaluation data, so that the score after quantization may look "
        "better than it is. Calibrate on other samples."
    )
