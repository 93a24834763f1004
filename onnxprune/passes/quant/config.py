"""Settings of the `quant` pass."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from onnxprune.contracts import QuantizationMode
from onnxprune.passes.quant.calibrate import CalibrationMethod
from onnxprune.passes.quant.engine_settings import EngineSettings
from onnxprune.passes.quant.fallback import FallbackKind
from onnxprune.passes.quant.weights import WeightMethod

__all__ = ["QuantConfig"]

# Settings that mean nothing without calibration data.
_CALIBRATION_SETTINGS = (
    "engine",
    "calibration_method",
    "percentile",
    "momentum",
    "num_samples",
    "activation_bits",
    "max_drop",
    "min_snr_db",
    "fallback",
    "diagnose",
)

# Settings that mean something with one method only.
_METHOD_OF = {"percentile": "percentile", "momentum": "moving-average"}


class QuantConfig(EngineSettings):
    """How to calibrate, and what to keep in float."""

    mode: QuantizationMode = "static"
    """"static": ranges of activations from calibration data. "dynamic": from the numbers of each run, where that is
    faster than float. "weight-only": only weights are integers. The last two need no calibration data."""
    calibration_method: CalibrationMethod = "minmax"
    """"minmax": the extremes over all samples. "moving-average": the average of each batch's extremes. "percentile":
    cuts outliers, as `percentile` says. "entropy": loses least information (TensorRT's Kullback-Leibler divergence).
    "mse": the smallest squared error of rounding and saturation."""
    percentile: float = Field(default=99.99, gt=50.0, le=100.0)
    """With "percentile": the middle share of a tensor's numbers, in percent, that does not saturate."""
    momentum: float = Field(default=0.99, ge=0.0, lt=1.0)
    """With "moving-average": a batch counts so many times as much as the next one."""
    per_channel: bool = True
    """One weight scale for each output channel; False: one for each weight."""
    weight_method: WeightMethod = "minmax"
    """"minmax": a weight scale ends at the largest magnitude. "mse": where the squared error is smallest."""
    weight_bits: int = Field(default=8, ge=4, le=8)
    """Bits that weights use; they are stored as int8 in any case."""
    activation_bits: Literal[8, 16] = 8
    """16 rounds activations 256 times finer. ONNX Runtime's CPU kernels have 8 bits only: see the targets' setting
    `placement = "everywhere"`, which writes 16 bits for NPUs."""
    num_samples: int | None = Field(default=None, ge=1)
    """Use the first so many calibration samples; None: all."""
    exclude: tuple[str, ...] = ()
    """Globs of what stays float: names of nodes and weights, modules with all inside them ("head", "*.stem")."""
    threads: int = Field(default=2, ge=1)
    """Threads of the float model while calibrating."""
    max_drop: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    """The score of the simulated int8 model may be worse by this much at most (0.01: one point of a score from 0 to 1).
    Layers leave 8 bits, the most damaging first, until that holds. Needs an evaluator."""
    min_snr_db: float | None = Field(default=None, allow_inf_nan=False)
    """The same without an evaluator: the signal-to-noise ratio of the outputs, at least, on calibration samples."""
    fallback: FallbackKind = "float"
    """Where damaging layers go: to float ("float"), or to 16-bit activations beside int8 weights ("int16")."""
    diagnose: bool = False
    """Measure the error of every layer: its own, and what has piled up. Done anyway where a goal does not hold."""

    @field_validator("exclude")
    @classmethod
    def _patterns_are_not_empty(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if any(not pattern for pattern in patterns):
            raise ValueError("an empty pattern matches nothing")
        return patterns

    @model_validator(mode="after")
    def _has_one_goal(self) -> QuantConfig:
        if self.max_drop is not None and self.min_snr_db is not None:
            raise ValueError("give one goal, `max_drop` or `min_snr_db`")
        return self

    @model_validator(mode="after")
    def _calibration_settings_have_data(self) -> QuantConfig:
        if self.mode == "static":
            return self
        fields = type(self).model_fields
        idle = [name for name in _CALIBRATION_SETTINGS if getattr(self, name) != fields[name].default]
        if idle:
            raise ValueError(f"mode '{self.mode}' calibrates nothing, so '{idle[0]}' has no effect in it")
        return self

    @model_validator(mode="after")
    def _settings_act_on_the_method(self) -> QuantConfig:
        fields = type(self).model_fields
        for name, method in _METHOD_OF.items():
            if getattr(self, name) != fields[name].default and self.calibration_method != method:
                raise ValueError(f"'{name}' acts only with calibration_method = '{method}'")
        if self.fallback != "float" and self.max_drop is None and self.min_snr_db is None:
            raise ValueError("'fallback' acts only with a goal, `max_drop` or `min_snr_db`")
        return self
