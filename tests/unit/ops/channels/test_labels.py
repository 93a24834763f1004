"""Labels: union-find over arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.ops.channels.labels import LabelSpace


def test_fresh_labels_are_classes_of_their_own() -> None:
    space = LabelSpace()
    first, second = space.fresh(3), space.fresh(2)
    assert [*first, *second] == [0, 1, 2, 3, 4]
    assert space.class_of().tolist() == [0, 1, 2, 3, 4]


def test_joined_labels_are_one_class_numbered_by_its_smallest_label() -> None:
    space = LabelSpace()
    a, b = space.fresh(3), space.fresh(3)
    space.join(b, a[::-1])
    assert space.class_of().tolist() == [0, 1, 2, 2, 1, 0]


def test_one_label_joined_with_several_in_one_call_joins_them_all() -> None:
    space = LabelSpace()
    labels = space.fresh(5)
    space.join(np.array([0, 0, 0]), np.array([4, 2, 3]))
    assert space.find(labels).tolist() == [0, 1, 0, 0, 0]


def test_growing_keeps_what_was_joined_and_frozen() -> None:
    space = LabelSpace()
    first = space.fresh(2)
    space.join(first[:1], first[1:])
    space.freeze(first[1:], "because")
    space.fresh(10_000)
    classes = space.class_of()
    assert classes[0] == classes[1]
    assert space.frozen_reasons(classes, int(classes.max()) + 1)[:2] == ["because", None]


def test_the_first_reason_of_a_class_stays() -> None:
    space = LabelSpace()
    labels = space.fresh(2)
    space.freeze(labels[1:], "first")
    space.freeze(labels, "second")
    space.join(labels[:1], labels[1:])
    assert space.frozen_reasons(space.class_of(), 1) == ["first"]


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60), st.integers(1, 10))
def test_classes_equal_connected_components(pairs: list[tuple[int, int]], calls: int) -> None:
    space = LabelSpace()
    space.fresh(30)
    component = list(range(30))
    for start in range(0, len(pairs), calls):
        chunk = pairs[start : start + calls]
        space.join(np.array([a for a, _ in chunk]), np.array([b for _, b in chunk]))
    for a, b in pairs:
        old, new = component[a], component[b]
        component = [new if number == old else number for number in component]
    found = space.class_of().tolist()
    assert [[found[i] == found[j] for j in range(30)] for i in range(30)] == [
        [component[i] == component[j] for j in range(30)] for i in range(30)
    ]
