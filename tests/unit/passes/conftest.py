"""Builders for small canonical models, and a run of a pass that verifies the model before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from onnxprune.contracts import CanonicalModel, ModelState, Pass, PassContext, PassOutcome
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.verify import verify
from onnxprune.ops.shapes import SHAPES
from onnxprune.passes.harness import run_pass
from onnxprune.runtime.feeds import random_feeds
from onnxprune.runtime.sessions import ort_runner_from_model

Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture
def make_model() -> Callable[..., CanonicalModel]:
    """From ONNX's text format (without the header) and initializers, to a canonical model."""

    def make(
        graph: str, weights: Mapping[str, npt.NDArray[Any]], *, modules: Mapping[str, str] | None = None
    ) -> CanonicalModel:
        """`modules` gives the module path of the node that makes the value of that name."""
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n{graph}')
        for name, array in weights.items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        for node in proto.graph.node:
            # Exporters name nodes after their modules; here after what they make.
            node.name = node.output[0]
            path = (modules or {}).get(node.output[0])
            if path:
                entry = node.metadata_props.add()
                entry.key, entry.value = "onnxprune.module_path", path
        return canonicalize(ir.from_proto(proto), shape_rules=SHAPES)

    return make


@pytest.fixture
def run_verified() -> Callable[..., PassOutcome]:
    """`run_pass`, with the canonical form checked before and after, and the caller's model shown to be untouched."""

    def run(pass_: Pass[Any, Any], model: CanonicalModel, *, context: PassContext | None = None) -> PassOutcome:
        verify(model)
        before = ir.to_proto(model).SerializeToString(deterministic=True)
        outcome = run_pass(pass_, ModelState(model=model), context or PassContext())
        verify(outcome.state.model)
        assert ir.to_proto(model).SerializeToString(deterministic=True) == before
        return outcome

    return run


@pytest.fixture
def outputs_of() -> Callable[..., Arrays]:
    """What a model gives for seeded inputs, computed without any optimization."""

    def outputs(model: ir.Model, *, seed: int = 0, batch: int = 1) -> Arrays:
        runner = ort_runner_from_model(model, optimization="disabled")
        return runner.run(random_feeds(runner.inputs, seed=seed, batch=batch))

    return outputs
