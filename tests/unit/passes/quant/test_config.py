"""Settings of `quant` that can't act are errors."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from onnxprune.passes.adaround.config import AdaRoundConfig
from onnxprune.passes.quant import QuantConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"percentile": 99.0}, "'percentile' acts only with calibration_method = 'percentile'"),
        ({"momentum": 0.5}, "'momentum' acts only with calibration_method = 'moving-average'"),
        ({"fallback": "int16"}, "'fallback' acts only with a goal"),
        ({"mode": "dynamic", "max_drop": 0.1}, "'max_drop' has no effect"),
        ({"max_drop": 0.1, "min_snr_db": 20.0}, "give one goal"),
    ],
)
def test_a_setting_that_can_not_act_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantConfig(**settings)


def test_iterations_are_refused_where_nothing_is_learned() -> None:
    with pytest.raises(ValidationError, match="'iterations' acts only with method = 'adaround'"):
        AdaRoundConfig(iterations=10)
    assert AdaRoundConfig(iterations=10, method="adaround").iterations == 10
