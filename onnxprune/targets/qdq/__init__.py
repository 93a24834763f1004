"""The int8 form of a model for ONNX Runtime: which nodes are integer (`place`), and how that is written (`spell`)."""

from __future__ import annotations

from onnxprune.targets.qdq.place import float_reasons, place
from onnxprune.targets.qdq.spell import spell
from onnxprune.targets.qdq.spelling import SPELLINGS, Spelling, SpellingName, find_spelling

__all__ = ["SPELLINGS", "Spelling", "SpellingName", "find_spelling", "float_reasons", "place", "spell"]
