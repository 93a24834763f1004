from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.errors import PreconditionError
from onnxprune.runtime.host import HostIsa
from onnxprune.targets.building import (
    custom_operators_finding,
    host_spelling,
    int8_finding,
    kernels_saturate,
    require_spelling,
    with_provenance,
    zeros_finding,
)
from tests.builders import canonical, conv_net, proto_of

AVX2 = HostIsa(arch="x86-64", has_avx2=True)
VNNI = HostIsa(arch="x86-64", has_avx2=True, has_vnni=True)
ARM = HostIsa(arch="arm64")
RISCV = HostIsa(arch="riscv64")


@pytest.mark.parametrize(("isa", "spelling"), [(AVX2, "x86"), (VNNI, "x86-vnni"), (ARM, "arm64"), (RISCV, None)])
def test_spelling_of_a_machine_follows_from_its_instruction_set(isa: HostIsa, spelling: str | None) -> None:
    assert host_spelling(isa) == spelling


def test_machine_without_a_spelling_is_refused_with_what_to_name() -> None:
    with pytest.raises(PreconditionError, match=r"'riscv64'.*'x86-vnni', 'x86' or 'arm64'"):
        require_spelling(host_spelling(RISCV), RISCV)


@pytest.mark.parametrize(
    ("spelling", "isa", "saturates"),
    [
        ("x86-vnni", AVX2, True),
        ("x86-vnni", VNNI, False),
        ("x86-vnni", ARM, False),
        ("x86", AVX2, False),
        ("arm64", AVX2, False),
    ],
)
def test_only_full_weights_without_vnni_saturate(spelling: str, isa: HostIsa, saturates: bool) -> None:
    assert kernels_saturate(spelling, isa) is saturates  # type: ignore[arg-type]
    assert ("saturate" in int8_finding(spelling, spelling, isa).text) is saturates  # type: ignore[arg-type]


def test_custom_operators_are_named() -> None:
    proto = proto_of(
        [helper.make_node("Magic", ["x"], ["t"], domain="acme"), helper.make_node("Relu", ["t"], ["y"])],
        inputs={"x": [1]},
        outputs={"y": [1]},
    )
    proto.opset_import.append(helper.make_opsetid("acme", 1))
    finding = custom_operators_finding(ir.from_proto(proto))
    assert finding is not None
    assert "register a library with 'acme::Magic'" in finding.text
    assert custom_operators_finding(conv_net()) is None


def test_provenance_is_written_in_a_fixed_order_and_the_model_stays_as_it_was() -> None:
    model = conv_net()
    first = with_provenance(model, {"b": 1, "a": [1, 2]}).metadata_props
    second = with_provenance(model, {"a": [1, 2], "b": 1}).metadata_props
    assert first["onnxprune"] == second["onnxprune"] == '{"a":[1,2],"b":1}'
    assert "onnxprune" not in model.metadata_props


def test_few_zeros_are_not_worth_a_word() -> None:
    assert zeros_finding(conv_net(), stored_as="an ONNX file") is None


@pytest.mark.parametrize(("num_zeros", "is_said"), [(9, False), (10, True)])
def test_zeros_are_said_from_a_tenth_on(num_zeros: int, is_said: bool) -> None:
    weights = np.ones(100, np.float32)
    weights[:num_zeros] = 0
    node = helper.make_node("Add", ["x", "w"], ["y"], name="add")
    model = canonical(proto_of([node], inputs={"x": [100]}, outputs={"y": [100]}, weights={"w": weights}))

    finding = zeros_finding(model, stored_as="an ONNX file")

    assert (finding is not None) == is_said
