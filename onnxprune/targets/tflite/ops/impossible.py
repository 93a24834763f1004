"""Operators that can't be expressed, with the fact that forbids each; and what of the official cases is lost to it."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["EXCLUDED", "REASONS"]

_STRINGS = "TFLite compares strings for equality, and has no operator that takes them apart or makes others"
_SEQUENCES = "TFLite has tensors only, no sequences"
_OPTIONALS = "TFLite has tensors only, no optional values"
_DECODING = "TFLite has no operator that decodes image files"
_REGIONS = "its windows lie where the numbers say, and those of TFLite's pooling are the same everywhere"
_EMPTY = "its result has no elements, and LiteRT's interpreter refuses to hand such a tensor out"

REASONS: Mapping[str, str] = {
    "ConcatFromSequence": _SEQUENCES,
    "ImageDecoder": _DECODING,
    "MaxRoiPool": _REGIONS,
    "Optional": _OPTIONALS,
    "OptionalGetElement": _OPTIONALS,
    "OptionalHasElement": _OPTIONALS,
    "RegexFullMatch": _STRINGS,
    "SequenceAt": _SEQUENCES,
    "SequenceConstruct": _SEQUENCES,
    "SequenceEmpty": _SEQUENCES,
    "SequenceErase": _SEQUENCES,
    "SequenceInsert": _SEQUENCES,
    "SequenceLength": _SEQUENCES,
    "SequenceMap": _SEQUENCES,
    "SplitToSequence": _SEQUENCES,
    "StringConcat": _STRINGS,
    "StringNormalizer": _STRINGS,
    "StringSplit": _STRINGS,
}
"""The reason by ONNX operator, for those that no family emits."""

EXCLUDED = {
    "test_identity_opt": _OPTIONALS,
    "test_if_opt": _OPTIONALS,
    "test_if_seq": _SEQUENCES,
    "test_image_decoder*": _DECODING,
    "test_loop13_seq": _SEQUENCES,
    "test_loop16_seq_none": _OPTIONALS,
    "test_reduce_sum_empty_set_non_reduced_axis_zero*": _EMPTY,
    "test_regex_full_match*": _STRINGS,
    "test_scan_sum": "the Scan of opset 8 has a batch axis, which none of the canonical opsets has",
    "test_sequence_*": _SEQUENCES,
    "test_slice_start_out_of_bounds": _EMPTY,
    "test_split_to_sequence*": _SEQUENCES,
    "test_split_zero_size_splits*": _EMPTY,
    "test_string_*": _STRINGS,
    "test_strnormalizer*": _STRINGS,
    "test_tri[lu]_zero": _EMPTY,
}
