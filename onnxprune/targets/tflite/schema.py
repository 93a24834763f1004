"""What the TFLite schema says about operators: which options table belongs to a kind, and its enumerations.

The schema comes with ai-edge-litert; nothing of it is copied here but the names.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from onnxprune.errors import MissingExtraError
from onnxprune.targets.tflite.graph import OptionValue

__all__ = ["options_of", "schema"]

# Kinds whose options table is not called after them.
_OPTIONS = {
    "ADD_N": "AddNOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "BATCH_TO_SPACE_ND": "BatchToSpaceNDOptions",
    "CONV_2D": "Conv2DOptions",
    "CONV_3D": "Conv3DOptions",
    "CONV_3D_TRANSPOSE": "Conv3DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "L2_NORMALIZATION": "L2NormOptions",
    "L2_POOL_2D": "Pool2DOptions",
    "LSTM": "LSTMOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "PADV2": "PadV2Options",
    "REDUCE_ALL": "ReducerOptions",
    "REDUCE_ANY": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    "REDUCE_PROD": "ReducerOptions",
    "RFFT2D": "Rfft2dOptions",
    "RNN": "RNNOptions",
    "SPACE_TO_BATCH_ND": "SpaceToBatchNDOptions",
    "SUM": "ReducerOptions",
    "SVDF": "SVDFOptions",
    "TOPK_V2": "TopKV2Options",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "UnidirectionalSequenceLSTMOptions",
    "UNIDIRECTIONAL_SEQUENCE_RNN": "SequenceRNNOptions",
    "BIDIRECTIONAL_SEQUENCE_LSTM": "BidirectionalSequenceLSTMOptions",
    "BIDIRECTIONAL_SEQUENCE_RNN": "BidirectionalSequenceRNNOptions",
    "RANDOM_STANDARD_NORMAL": "RandomOptions",
    "RANDOM_UNIFORM": "RandomOptions",
    "MULTINOMIAL": "RandomOptions",
    "ATAN2": "ATan2Options",
}
# Fields that hold an enumeration, by the enumeration's name.
_ENUMERATIONS = {
    "padding": "Padding",
    "fusedActivationFunction": "ActivationFunctionType",
    "mode": "MirrorPadMode",
    "inDataType": "TensorType",
    "outDataType": "TensorType",
    "outType": "TensorType",
    "idxOutType": "TensorType",
    "outputType": "TensorType",
    "quantizedBiasType": "TensorType",
    "weightsFormat": "FullyConnectedOptionsWeightsFormat",
    "kernelType": "LSTMKernelType",
    "reduceFunction": "ReduceWindowFunction",
}


def schema() -> ModuleType:
    """The generated classes of the schema.

    Raises:
        MissingExtraError: ai-edge-litert is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise MissingExtraError(package="ai-edge-litert", extra="tflite", needed_for="Target 'tflite'") from error
    found: ModuleType = schema_py_generated
    return found


def options_of(kind: str, options: dict[str, OptionValue]) -> tuple[int, int, Any]:
    """(type in BuiltinOptions, type in BuiltinOptions2, table) of an operator; 0, 0, None where it has no options.

    Raises:
        ValueError: The kind has no such option (a bug of an emitter).
    """
    module = schema()
    name = _OPTIONS.get(kind) or "".join(part.capitalize() for part in kind.lower().split("_")) + "Options"
    table_type = getattr(module, f"{name}T", None)
    if table_type is None:
        if options:
            raise ValueError(f"{kind} has no options, and was given {sorted(options)}")
        return 0, 0, None
    table = table_type()
    for field, value in options.items():
        if not hasattr(table, field):
            raise ValueError(f"{name} has no field '{field}'")
        setattr(table, field, _plain(module, field, value))
    return getattr(module.BuiltinOptions, name, 0), getattr(module.BuiltinOptions2, name, 0), table


def _plain(module: ModuleType, field: str, value: OptionValue) -> object:
    if isinstance(value, str):
        return getattr(getattr(module, _ENUMERATIONS[field]), value)
    return list(value) if isinstance(value, tuple) else value
