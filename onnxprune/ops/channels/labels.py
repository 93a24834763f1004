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

# Larger than the index of any reason, so that the smallest of a class is the reason that came first.
_NOT_FROZEN = np.iinfo(np.int64).max


class LabelSpace:
    """All labels of one model."""

    def __init__(self) -> None:
        self._parent: LabelArray = np.arange(1024, dtype=np.int64)
        # Both are kept at the root of each class: the first reason why it is frozen, and whether it counts units.
        self._frozen: LabelArray = np.full(1024, _NOT_FROZEN, dtype=np.int64)
        self._is_unit: npt.NDArray[np.bool_] = np.zeros(1024, dtype=np.bool_)
        self._size = 0
        self._reasons: list[str] = []

    def __len__(self) -> int:
        return self._size

    def copy(self) -> LabelSpace:
        """The same labels, to try joins and freezes on."""
        twin = LabelSpace()
        twin._parent, twin._frozen, twin._is_unit = self._parent.copy(), self._frozen.copy(), self._is_unit.copy()
        twin._size, twin._reasons = self._size, list(self._reasons)
        return twin

    def fresh(self, count: int) -> LabelArray:
        """`count` new labels, each a class of its own."""
        start, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            missing = max(self._size, 2 * len(self._parent)) - len(self._parent)
            more = np.arange(len(self._parent), len(self._parent) + missing, dtype=np.int64)
            self._parent = np.concatenate([self._parent, more])
            self._frozen = np.concatenate([self._frozen, np.full(missing, _NOT_FROZEN, dtype=np.int64)])
            self._is_unit = np.concatenate([self._is_unit, np.zeros(missing, dtype=np.bool_)])
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
            np.minimum.at(self._frozen, low, self._frozen[high])
            np.logical_or.at(self._is_unit, low, self._is_unit[high])

    def freeze(self, labels: LabelArray, reason: str) -> None:
        """Never remove the classes of these labels. The first reason given for a class stays."""
        if not labels.size:
            return
        roots = self.find(labels)
        untouched = roots[self._frozen[roots] == _NOT_FROZEN]
        if untouched.size:
            self._frozen[untouched] = len(self._reasons)
            self._reasons.append(reason)

    def is_frozen(self, labels: LabelArray) -> npt.NDArray[np.bool_]:
        """For each label: True when its class is frozen, as far as known by now."""
        return np.asarray(self._frozen[self.find(labels)] != _NOT_FROZEN)

    def frozen_reason(self, labels: LabelArray) -> str | None:
        """The first reason why one of these labels is frozen, or None."""
        first = int(self._frozen[self.find(labels)].min(initial=_NOT_FROZEN))
        return self._reasons[first] if first != _NOT_FROZEN else None

    def mark_units(self, labels: LabelArray) -> None:
        """Say that these labels count units which work as a whole (attention heads)."""
        self._is_unit[self.find(labels)] = True

    def is_unit(self, labels: LabelArray) -> npt.NDArray[np.bool_]:
        """For each label: True when its class counts units."""
        return np.asarray(self._is_unit[self.find(labels)])

    def class_of(self) -> LabelArray:
        """Class number of every label; classes are numbered from 0 in the order of their smallest label."""
        roots = self.find(np.arange(self._size, dtype=np.int64))
        return np.unique(roots, return_inverse=True)[1].astype(np.int64)

    def frozen_reasons(self, class_of: LabelArray, num_classes: int) -> list[str | None]:
        """Why each class is frozen: the reason that came first; None: it may be removed."""
        first = np.full(num_classes, _NOT_FROZEN, dtype=np.int64)
        np.minimum.at(first, class_of, self._frozen[self.find(np.arange(self._size, dtype=np.int64))])
        return [self._reasons[index] if index != _NOT_FROZEN else None for index in first.tolist()]
