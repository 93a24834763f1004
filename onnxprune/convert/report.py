"""What a conversion hands over: the model in canonical form, and what is known about how it came to be."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxprune.contracts import CanonicalModel, OutputDifference, TensorSpec

__all__ = ["ConversionReport", "ConvertedModel", "SourceKind"]


class SourceKind(enum.Enum):
    """Every kind of source that can be converted."""

    ONNX = "ONNX file"
    TORCH_EXPORTED = "PyTorch ExportedProgram"
    TORCH_FACTORY = "PyTorch factory"
    TORCH_OBJECT = "PyTorch object"
    SAVED_MODEL = "TensorFlow SavedModel"
    KERAS_FILE = "Keras file"
    KERAS_H5 = "Keras HDF5 file"
    KERAS_OBJECT = "Keras object"
    FROZEN_GRAPH = "TensorFlow frozen graph"
    TFLITE = "TFLite file"

    @property
    def is_torch(self) -> bool:
        """True for everything that PyTorch's exporter converts."""
        return self in (SourceKind.TORCH_EXPORTED, SourceKind.TORCH_FACTORY, SourceKind.TORCH_OBJECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """How a source became a model.

    `difference` is the source against the result on the same seeded inputs, None when they could not be compared;
    `not_compared_reason` then says why. `shape_used` are the input shapes of that comparison, the ones that
    figures such as MACs and latency stand for when no other shape is asked for.
    """

    source_name: str
    """File name or factory, without folders; for objects the class name."""
    kind: SourceKind
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    difference: OutputDifference | None
    not_compared_reason: str = ""
    num_comparisons: int = 0
    tolerance: float
    """The limit that was held: of `difference.max_rel`, and for quantized sources of what the note about them says."""
    seed: int
    shape_used: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the model carries: labels and whatever else the source knows about itself."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages that took part in the conversion."""
    notes: tuple[str, ...] = ()
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedModel:
    """A model in canonical form and the report about its conversion."""

    model: CanonicalModel
    report: ConversionReport
