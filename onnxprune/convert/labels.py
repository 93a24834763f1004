"""Class names that a source carries, in one form: `metadata_props["labels"]` is a JSON list of strings."""

from __future__ import annotations

import json
from collections.abc import Iterable

__all__ = ["LABELS_KEY", "MAX_LABEL_BYTES", "is_label_file", "labels_from_lines", "labels_metadata"]

LABELS_KEY = "labels"
MAX_LABEL_BYTES = 1 << 20


def is_label_file(name: str) -> bool:
    """True for 'labels.txt', 'imagenet_labels.txt' and the like."""
    stem, _, suffix = name.rpartition("/")[2].lower().rpartition(".")
    return suffix == "txt" and "label" in stem


def labels_from_lines(text: str) -> dict[str, str]:
    """Metadata from a label file: one class a line; {} where there is none."""
    return labels_metadata(line.strip() for line in text.splitlines() if line.strip())


def labels_metadata(labels: Iterable[str]) -> dict[str, str]:
    """Metadata for `labels`; {} where there are none."""
    listed = list(labels)
    return {LABELS_KEY: json.dumps(listed, ensure_ascii=False)} if listed else {}
