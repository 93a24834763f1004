"""The int8 form of a model for ONNX Runtime: which nodes are integer (`place`), and how that is written (`spell`)."""

from __future__ import annotations

from onnxprune.targets.qdq.place import float_reasons, place
from onnxprune.targets.qdq.spell import spell
from onnxprune.targets.qdq.spelling import SPELLINGS, TFLITE, Spelling, SpellingName, find_spelling
from onnxprune.targets.qdq.tflite import TfliteConflict, place_tflite, tflite_conflicts

__all__ = [
    "SPELLINGS",
    "TFLITE",
    "Spelling",
    "SpellingName",
    "TfliteConflict",
    "find_spelling",
    "float_reasons",
    "place",
    "place_tflite",
    "spell",
    "tflite_conflicts",
]
