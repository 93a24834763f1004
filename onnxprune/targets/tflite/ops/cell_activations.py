"""Activations that LSTM, GRU and RNN name in their attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.table import NodeView

__all__ = ["Activation", "activations_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """One of the functions, with its parameters."""

    name: str
    alpha: float
    beta: float

    def __call__(self, build: Builder, x: Tensor) -> Tensor:
        """The function of `x`."""
        return _FUNCTIONS[self.name](build, x, self.alpha, self.beta)


def activations_of(node: NodeView, default: Sequence[str], directions: int) -> list[tuple[Activation, ...]]:
    """The functions of each direction.

    Parameters are handed out in order to those functions that have any, as ONNX Runtime does it.
    """
    names = [name.lower() for name in node.node.attributes.get_strings("activations", ())]
    names = names or [name.lower() for name in default] * directions
    if len(names) != len(default) * directions:
        raise UnsupportedError(f"{len(names)} activations for {directions} directions of {len(default)}")
    alphas = list(node.node.attributes.get_floats("activation_alpha", ()))
    betas = list(node.node.attributes.get_floats("activation_beta", ()))
    found = []
    for name in names:
        if name not in _FUNCTIONS:
            raise UnsupportedError(f"activation '{name}' is not known")
        alpha, beta = (
            _next(name, parameter, given, defaults)
            for parameter, given, defaults in (("alpha", alphas, _ALPHAS), ("beta", betas, _BETAS))
        )
        found.append(Activation(name=name, alpha=alpha, beta=beta))
    size = len(default)
    return [tuple(found[start : start + size]) for start in range(0, len(found), size)]


def _next(name: str, parameter: str, given: list[float], defaults: Mapping[str, float | None]) -> float:
    """The parameter of the next function; 0 where it has none."""
    if name not in defaults:
        return 0.0
    value = given.pop(0) if given else defaults[name]
    if value is None:
        raise UnsupportedError(f"activation '{name}' has no {parameter}, and runtimes differ about the default")
    return value


def _number(build: Builder, value: float) -> Tensor:
    return build.constant(np.float32(value))


def _simple(kind: str) -> Callable[[Builder, Tensor, float, float], Tensor]:
    return lambda build, x, _alpha, _beta: build.op(kind, [x])


def _affine(build: Builder, x: Tensor, alpha: float, beta: float) -> Tensor:
    return build.binary("ADD", build.binary("MUL", x, _number(build, alpha)), _number(build, beta))


def _leaky_relu(build: Builder, x: Tensor, alpha: float, _beta: float) -> Tensor:
    return build.op("LEAKY_RELU", [x], alpha=alpha)


def _thresholded_relu(build: Builder, x: Tensor, alpha: float, _beta: float) -> Tensor:
    above = build.binary("GREATER", x, _number(build, alpha), type_="BOOL")
    return build.op("SELECT_V2", [above, x, _number(build, 0.0)], shape=x.shape, type_=x.type)


def _scaled_tanh(build: Builder, x: Tensor, alpha: float, beta: float) -> Tensor:
    inner = build.op("TANH", [build.binary("MUL", x, _number(build, beta))])
    return build.binary("MUL", inner, _number(build, alpha))


def _hard_sigmoid(build: Builder, x: Tensor, alpha: float, beta: float) -> Tensor:
    return build.op("RELU_0_TO_1", [_affine(build, x, alpha, beta)])


def _elu(build: Builder, x: Tensor, alpha: float, _beta: float) -> Tensor:
    """The operator's alpha is 1: the two sides of another one are added."""
    if alpha == 1.0:
        return build.op("ELU", [x])
    below = build.op("ELU", [build.binary("MINIMUM", x, _number(build, 0.0))])
    return build.binary("ADD", build.op("RELU", [x]), build.binary("MUL", below, _number(build, alpha)))


def _softsign(build: Builder, x: Tensor, _alpha: float, _beta: float) -> Tensor:
    return build.binary("DIV", x, build.binary("ADD", build.op("ABS", [x]), _number(build, 1.0)))


def _softplus(build: Builder, x: Tensor, _alpha: float, _beta: float) -> Tensor:
    """max(x, 0) + log(1 + exp(-|x|)), which never overflows."""
    small = build.op("EXP", [build.op("NEG", [build.op("ABS", [x])])])
    return build.binary(
        "ADD", build.op("RELU", [x]), build.op("LOG", [build.binary("ADD", small, _number(build, 1.0))])
    )


_FUNCTIONS: Mapping[str, Callable[[Builder, Tensor, float, float], Tensor]] = {
    "relu": _simple("RELU"),
    "tanh": _simple("TANH"),
    "sigmoid": _simple("LOGISTIC"),
    "affine": _affine,
    "leakyrelu": _leaky_relu,
    "thresholdedrelu": _thresholded_relu,
    "scaledtanh": _scaled_tanh,
    "hardsigmoid": _hard_sigmoid,
    "elu": _elu,
    "softsign": _softsign,
    "softplus": _softplus,
}
# Of functions that have the parameter: its default. None: the specification and ONNX Runtime differ.
_ALPHAS: Mapping[str, float | None] = {
    "affine": None,
    "leakyrelu": 0.01,
    "thresholdedrelu": None,
    "scaledtanh": None,
    "hardsigmoid": 0.2,
    "elu": 1.0,
}
_BETAS: Mapping[str, float | None] = {"affine": None, "scaledtanh": None, "hardsigmoid": 0.5}
