"""What a person reads of a comparison."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from onnxprune.contracts import FallbackCost, LatencyRatio, LatencySummary, OutputDifference
from onnxprune.evaluate.model_diff import LayerDifference, ModelComparison
from onnxprune.evaluate.tensor_diff import TensorDifference
from onnxprune.report.comparison import TENSORS_SHOWN, print_comparison, verdict
from onnxprune.report.fallback import fallback_text


def layer(number: int, snr_db: float, added_db: float = math.inf) -> LayerDifference:
    tensor = TensorDifference(
        name=f"t{number}",
        actual_name=f"t{number}",
        snr_db=snr_db,
        cosine=0.99,
        kl_nats=0.01,
        max_abs=0.5,
        max_reference=2.0,
        num_values=10,
    )
    return LayerDifference(tensor=tensor, node=f"node{number}", op_type="Conv", added_db=added_db)


def comparison(*layers: LayerDifference, snr_db: float = 14.4) -> ModelComparison:
    worst = OutputDifference(max_abs=0.1, max_rel=0.05, cosine=0.98, snr_db=snr_db)
    return ModelComparison(
        reference="a.onnx",
        actual="b.onnx",
        outputs=OutputDifference(max_abs=0.1, max_rel=0.05, cosine=0.98, snr_db=snr_db, per_output={"scores": worst}),
        num_samples=4,
        data="random",
        layers=layers,
        not_compared={"odd": "its shape is 1 here and 2 there"},
    )


def printed(found: ModelComparison, *, worst_first: bool = False, show_all: bool = False, width: int = 160) -> str:
    text = io.StringIO()
    print_comparison(found, worst_first=worst_first, show_all=show_all, console=Console(file=text, width=width))
    return text.getvalue()


def test_verdict_names_the_first_tensor_that_falls_off_and_the_layer_where_error_arises() -> None:
    found = comparison(layer(0, 40.0, 40.0), layer(1, 19.0, 19.2), layer(2, 12.0, 15.0))
    assert verdict(found) == (
        "The outputs keep 14.4 dB ('scores' is the worst). The first tensor below 20 dB is 't1' of Conv 'node1'. "
        "Most error arises in Conv 'node2': 15.0 dB."
    )


def test_verdict_says_that_nothing_falls_off() -> None:
    text = verdict(comparison(layer(0, 40.0, 40.0), snr_db=math.inf))
    assert text.startswith("All outputs are equal. No tensor falls below 20 dB.")


def test_tensors_come_in_graph_order_and_the_worst_first_on_demand() -> None:
    found = comparison(layer(0, 40.0), layer(1, 10.0), layer(2, 30.0))
    in_order, by_error = printed(found), printed(found, worst_first=True)
    assert in_order.index("node0") < in_order.index("node1") < in_order.index("node2")
    assert by_error.index("node1") < by_error.index("node2") < by_error.index("node0")
    assert "'odd': its shape is 1 here and 2 there" in in_order


def test_long_tables_are_cut_unless_all_is_asked_for() -> None:
    found = comparison(*(layer(number, 30.0) for number in range(TENSORS_SHOWN + 5)))
    assert "and 5 more tensors" in printed(found)
    assert f"(node{TENSORS_SHOWN + 4})" in printed(found, show_all=True)


@pytest.mark.parametrize(("width", "has_details"), [(80, False), (100, True)])
def test_names_of_thirty_characters_stand_in_one_line(width: int, has_details: bool) -> None:
    found = layer(1, -12.3, -12.4)
    tensor = replace(found.tensor, name="/features.10/block/Conv_output")
    long = replace(found, tensor=tensor, node="/features.10/block/Conv", op_type="ConvTranspose")
    text = printed(comparison(long), width=width)
    (line,) = [line for line in text.splitlines() if line.startswith(tensor.name)]
    assert "-12.3 dB" in line
    assert ("0.99000" in line, "KL: from 100 columns on" in text) == (has_details, not has_details)


def test_node_is_named_where_the_tensor_does_not_say_it() -> None:
    same = replace(layer(1, 30.0), node="t1")
    text = printed(comparison(same, layer(2, 30.0)))
    assert "t2 (node2)" in text
    assert "(t1)" not in text


def test_headers_say_over_what_each_ratio_is_taken() -> None:
    text = " ".join(printed(comparison(layer(0, 30.0)), width=80).split())
    assert "SNR, worst" in text
    assert "SNR, all" in text


def test_outputs_without_a_finite_number_are_not_called_equal() -> None:
    nothing = OutputDifference(max_abs=0.0, max_rel=0.0, cosine=1.0, snr_db=math.inf, is_compared=False)
    found = comparison(snr_db=math.inf)
    odd = replace(found, outputs=replace(nothing, per_output={**found.outputs.per_output, "odd": nothing}))
    assert verdict(odd).startswith("Nothing was compared of 'odd'")
    assert "not finite" in printed(odd)
    assert "All outputs are equal" not in printed(odd)


def summary(p50_ms: float) -> LatencySummary:
    return LatencySummary(p50_ms=p50_ms, p90_ms=p50_ms, p99_ms=p50_ms, num_runs=9, num_warmup=1, threads=1)


@pytest.mark.parametrize(
    ("before", "after", "interval", "text"),
    [
        (5.1, 5.5, (0.90, 0.95), "fallback of 3 layers costs 0.4 ms (5.1 ms -> 5.5 ms)."),
        (5.5, 5.1, (1.05, 1.10), "fallback of 3 layers saves 0.4 ms (5.5 ms -> 5.1 ms)."),
        (5.1, 5.2, (0.95, 1.02), "fallback of 3 layers costs nothing that can be measured (5.1 ms -> 5.2 ms)."),
    ],
    ids=["costs", "saves", "noise"],
)
def test_cost_of_a_fallback_is_said_in_milliseconds(
    before: float, after: float, interval: tuple[float, float], text: str
) -> None:
    latency = LatencyRatio(
        ratio=before / after, low=interval[0], high=interval[1], before=summary(before), after=summary(after)
    )
    assert fallback_text(FallbackCost(num_layers=3, latency=latency)) == text


def test_a_cost_that_is_not_measured_says_why() -> None:
    cost = FallbackCost(num_layers=1, latency=None, not_measured_reason="latency is not measured in this run")
    assert fallback_text(cost) == (
        "what the fallback of 1 layer costs is not measured: latency is not measured in this run."
    )
