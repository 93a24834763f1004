"""Labels: one integer for each index of an axis, and which of them live or die together.

A label is a number. Joining labels (union-find) says that they stand for the same channel, so that they are kept or
removed together. Freezing a label says that its whole class can't be removed, and why. All operations take arrays:
their cost grows with the number of labels handed in, never with the number of labels there are.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["AxisLabels", "LabelArray", "LabelSpace"]

LabelArray: TypeAlias = npt.NDArray[np.int64]
AxisLabels: TypeAlias = tuple[LabelArray | None, ...]
"""Labels of each axis of a value; None: nothing on this axis can be removed."""

_NOT_FROZEN = -1


class LabelSpace:
    """All labels of one model."""

    def __init__(self) -> None:
        self._parent: LabelArray = np.arange(1024, dtype=np.int64)
        self._frozen: LabelArray = np.full(1024, _NOT_FROZEN, dtype=np.int64)
        self._size = 0
        self._reasons: list[str] = []

    def __len__(self) -> int:
        return self._size

    def fresh(self, count: int) -> LabelArray:
        """`count` new labels, each a class of its own."""
        start, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            grown = max(self._size, 2 * len(self._parent))
            parent = np.arange(grown, dtype=np.int64)
            parent[:start] = self._parent[:start]
            frozen = np.full(grown, _NOT_FROZEN, dtype=np.int64)
            frozen[:start] = self._frozen[:start]
            self._parent, self._frozen = parent, frozen
        return np.arange(start, self._size, dtype=np.int64)

    def find(self, labels: LabelArray) -> LabelArray:
        """The smallest label of each label's class, as far as joined by now."""
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[labels] = roots
        return roots

    def join(self, left: LabelArray, right: LabelArray) -> None:
        """Put the labels at equal positions into one class; the arrays have the same length."""
        while True:
            roots_left, roots_right = self.find(left), self.find(right)
            differ = roots_left != roots_right
            if not differ.any():
                return
            low = np.minimum(roots_left[differ], roots_right[differ])
            high = np.maximum(roots_left[differ], roots_right[differ])
            # One root may meet several others in one call: the smallest wins now, the rest in the next round.
            np.minimum.at(self._parent, high, low)

    def freeze(self, labels: LabelArray, reason: str) -> None:
        """Never remove the classes of these labels. The first reason given for a label stays."""
        if not labels.size:
            return
        untouched = labels[self._frozen[labels] == _NOT_FROZEN]
        if untouched.size:
            self._frozen[untouched] = len(self._reasons)
            self._reasons.append(reason)

    def class_of(self) -> LabelArray:
        """Class number of every label; classes are numbered from 0 in the order of their smallest label."""
        roots = self.find(np.arange(self._size, dtype=np.int64))
        return np.unique(roots, return_inverse=True)[1].astype(np.int64)

    def frozen_reasons(self, class_of: LabelArray, num_classes: int) -> list[str | None]:
        """Why each class is frozen: the reason that came first; None: it may be removed."""
        first = np.full(num_classes, len(self._reasons), dtype=np.int64)
        frozen = self._frozen[: self._size]
        is_frozen = frozen != _NOT_FROZEN
        np.minimum.at(first, class_of[is_frozen], frozen[is_frozen])
        return [self._reasons[index] if index < len(self._reasons) else None for index in first.tolist()]
