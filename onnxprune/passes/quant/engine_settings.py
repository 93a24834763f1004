"""Settings of the `quant` pass that choose who calibrates, and what a foreign engine can't honour."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from onnxprune.contracts import CHECK_MARK, PATH_MARK, PassConfig

__all__ = ["CALIBRATION_METHODS", "EngineName", "EngineSettings"]

EngineName = Literal["onnxprune", "neural-compressor"]

CALIBRATION_METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
"""Calibration methods of ours that onnx-neural-compressor has, and what it calls them."""

HONOURED = frozenset(
    {
        "calibration_method",
        "percentile",
        "per_channel",
        "num_samples",
        "exclude",
        "threads",
        "max_drop",
        "min_snr_db",
        "fallback",
        "diagnose",
    }
)
"""Settings of the pass that act on a plan of onnx-neural-compressor as they act on our own."""


class EngineSettings(PassConfig):
    """Who calibrates, and how a foreign engine does."""

    engine: EngineName = "onnxprune"
    """Who calibrates. "neural-compressor": onnx-neural-compressor 1.0, in the interpreter `engine_python`."""
    engine_python: str | None = Field(default=None, json_schema_extra={PATH_MARK: "program"})
    """Path of a Python interpreter that has onnx-neural-compressor (which needs numpy < 2, so it is not this one)."""
    engine_op_types: tuple[str, ...] = ()
    """With "neural-compressor": the operators it quantizes (`op_types_to_quantize`); none: its own list."""
    engine_activation_symmetric: bool = False
    """With "neural-compressor": activations have the zero point in the middle (`ActivationSymmetric`)."""
    engine_quantize_last_matmul: bool = True
    """With "neural-compressor": the model's last MatMul is quantized too (`quant_last_matmul`)."""
    engine_timeout_s: float = Field(default=3600.0, gt=0.0, json_schema_extra={CHECK_MARK: True})
    """With "neural-compressor": it is stopped after so many seconds."""

    @model_validator(mode="after")
    def _settings_act(self) -> Self:
        changed = {
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True, validated_data={})
        }
        if self.engine == "onnxprune":
            idle = sorted(name for name in changed if name.startswith("engine_"))
            if idle:
                raise ValueError(f"'{idle[0]}' acts only with engine = 'neural-compressor'")
            return self
        if not self.engine_python:
            raise ValueError(
                "'engine_python' must name a Python interpreter that has onnx-neural-compressor, "
                "such as '.venv-neural-compressor/bin/python'"
            )
        own = set(EngineSettings.model_fields)
        ignored = sorted(changed - own - HONOURED)
        if ignored:
            raise ValueError(f"'{ignored[0]}' can't be honoured by engine = 'neural-compressor'")
        method = getattr(self, "calibration_method", "minmax")
        if method not in CALIBRATION_METHODS:
            raise ValueError(
                f"calibration_method '{method}' is not one that engine = 'neural-compressor' has: "
                f"{', '.join(CALIBRATION_METHODS)}"
            )
        return self
