"""What the caller wants converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["DEFAULT_TIMEOUT_S", "DEFAULT_TOLERANCE", "Dimension", "SourceRequest"]

Dimension = int | str
"""A fixed size, or the name of a dynamic axis."""

# Float kernels of two runtimes sum in different orders: deep float32 networks differ by 1e-6 to 1e-4 of their largest
# output. Wrong semantics (padding, half-pixel resizing, training-mode BatchNorm) start above 1e-2.
DEFAULT_TOLERANCE = 1e-3
DEFAULT_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRequest:
    """A source and how to convert it.

    An option that the kind of source has no use for is refused (`UsageError`), never ignored.
    """

    source: object
    """A path, a factory ("path/file.py:function" or "package.module:function"), a `torch.nn.Module`, a
    `torch.export.ExportedProgram` or a Keras model."""

    weights: Path | None = None
    """State dict (.pth, .pt, .safetensors ...) for a PyTorch factory."""

    shapes: Mapping[str, tuple[Dimension, ...]] = field(default_factory=dict)
    """Input name -> shape. A number fixes an axis, a name keeps it dynamic."""

    signature: str | None = None
    """Which signature of a SavedModel; None: 'serving_default', or the only one."""

    inputs: tuple[str, ...] = ()
    """Frozen graph: its input tensors. PyTorch: names for the inputs."""

    outputs: tuple[str, ...] = ()
    """Frozen graph: its output tensors. PyTorch: names for the outputs."""

    example_inputs: object = None
    """For a module object: the arguments of `forward` (a tensor, a tuple, or a mapping by argument name)."""

    dynamic_shapes: object = None
    """For a module object: as `torch.export.export` takes them."""

    trust_source: bool = False
    """Run code that the file brings along (pickles, Lambda layers). Never for files from others."""

    custom_op_libraries: tuple[Path, ...] = ()
    """Shared libraries with ONNX Runtime custom operators."""

    tolerance: float = DEFAULT_TOLERANCE
    """Largest absolute difference allowed, relative to the largest value of the output."""

    seed: int = 0
    """For the inputs on which source and result are compared."""

    timeout_s: float = DEFAULT_TIMEOUT_S
    """Limit for a converter, which runs in a process of its own."""

    memory_limit_bytes: int | None = None
    """Memory that a converter may ask for; None: this machine's."""
