"""What a run remembers of the model in front of passes that repair what int8 does."""

from __future__ import annotations

import pytest

from onnxprune.contracts import ModelState, PassContext
from onnxprune.graph.writer import content_hash
from onnxprune.passes.adaround.adaround import AdaRoundPass
from onnxprune.passes.adaround.config import AdaRoundConfig
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.pipeline.execute import Execution, PassesResult, run_stages
from onnxprune.pipeline.stages import AnyPass
from tests.builders import conv_net
from tests.quantization import normal_batches

MODEL = conv_net(batch=1)
QUANT = QuantPass(QuantConfig(weight_bits=4, threads=1))
ADAROUND = AdaRoundPass(AdaRoundConfig(num_samples=8, max_rows=64))


def result_of(*passes: AnyPass) -> PassesResult:
    execution = Execution(
        context=PassContext(calibration=normal_batches((1, 3, 8, 8), count=8)),
        start_key="start",
        cache=None,
        lock=None,
        source_score=None,
        threads=1,
    )
    return run_stages(passes, ModelState(model=MODEL), execution)


def test_float_model_that_quant_saw_outlives_the_rounding_of_its_weights() -> None:
    done = result_of(QUANT, ADAROUND)
    assert content_hash(done.state.model) != content_hash(MODEL)
    assert content_hash(done.unrepaired.model) == content_hash(MODEL)
    assert done.unrepaired.quantization == done.state.quantization
    assert done.repaired_by == ("adaround",)


@pytest.mark.parametrize("passes", [(), (QUANT,)], ids=["nothing", "quant"])
def test_without_a_repair_the_state_at_the_end_is_the_one_to_hold_artifacts_against(
    passes: tuple[AnyPass, ...],
) -> None:
    done = result_of(*passes)
    assert done.unrepaired is done.state
    assert done.repaired_by == ()
