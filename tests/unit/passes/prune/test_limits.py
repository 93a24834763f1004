"""Which widths layers may have: limits that hold, and widths that kernels like as a wish."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from onnxprune.contracts import CanonicalModel
from onnxprune.passes.prune.analysis import ChannelClasses, analyze_channels
from onnxprune.passes.prune.limits import axis_key, kernel_width, width_limits
from tests.layers import chain
from tests.patterns import network


def classes_of(model: CanonicalModel) -> ChannelClasses:
    return analyze_channels(model)


def without_lowest(classes: ChannelClasses, layer: int, count: int) -> tuple[npt.NDArray[np.bool_], np.ndarray]:
    """Flags that remove the first `count` classes of a layer, and scores that rise with the class number."""
    keeps = np.ones(classes.num_classes, dtype=np.bool_)
    keeps[classes.widths[layer].classes[:count]] = False
    return keeps, np.arange(classes.num_classes, dtype=np.float64)


def kept(classes: ChannelClasses, keeps: npt.NDArray[np.bool_]) -> list[int]:
    return [int(keeps[width.classes].sum()) for width in classes.widths]


@pytest.mark.parametrize(
    ("asked", "width", "rounded"),
    [
        (32, 64, 32),
        (72, 144, 64),  # 64 and 80 are equally near: the smaller
        (20, 40, 16),
        (29, 58, 32),
        (12, 24, 12),  # 8 and 16 are a third away
        (6, 12, 6),
        (58, 64, 56),  # 64 would take back all that goes
        (61, 64, 60),
        (63, 64, 63),
    ],
)
def test_a_width_moves_to_the_largest_block_that_is_not_far(asked: int, width: int, rounded: int) -> None:
    assert kernel_width(asked, width) == rounded


def test_a_width_moves_by_a_quarter_of_what_stays_and_half_of_what_goes_at_most() -> None:
    for width in range(2, 300):
        for asked in range(1, width):
            moved = abs(kernel_width(asked, width) - asked)
            assert moved <= 0.25 * asked
            assert moved <= 0.5 * (width - asked)


def test_auto_takes_the_least_important_channels_to_get_down_to_a_kernel_width() -> None:
    classes = classes_of(chain(40, 10))
    keeps, scores = without_lowest(classes, 0, 20)
    limits = width_limits(classes, min_channels=1, channel_multiple="auto")
    repaired = limits.repaired(keeps, scores)
    assert np.flatnonzero(repaired[classes.widths[0].classes]).tolist() == list(range(24, 40))


def test_auto_puts_the_most_important_channels_back_to_get_up_to_a_kernel_width() -> None:
    classes = classes_of(chain(58, 10))
    keeps, scores = without_lowest(classes, 0, 29)
    limits = width_limits(classes, min_channels=1, channel_multiple="auto")
    repaired = limits.repaired(keeps, scores)
    assert np.flatnonzero(repaired[classes.widths[0].classes]).tolist() == list(range(26, 58))


def test_auto_puts_back_only_where_rounding_down_is_not_wanted() -> None:
    classes = classes_of(chain(40, 10))
    keeps, scores = without_lowest(classes, 0, 20)
    limits = width_limits(classes, min_channels=1, channel_multiple="auto", rounds_down=False)
    assert kept(classes, limits.repaired(keeps, scores))[0] == 24


def test_auto_leaves_a_width_alone_that_was_not_touched() -> None:
    classes = classes_of(chain(58, 40, 10))
    keeps, scores = without_lowest(classes, 1, 20)
    limits = width_limits(classes, min_channels=1, channel_multiple="auto")
    assert kept(classes, limits.repaired(keeps, scores))[:2] == [58, 16]


def test_auto_never_removes_a_class_without_a_score() -> None:
    classes = classes_of(chain(40, 10))
    keeps, scores = without_lowest(classes, 0, 20)
    scores[classes.widths[0].classes] = np.nan
    limits = width_limits(classes, min_channels=1, channel_multiple="auto")
    assert (limits.repaired(keeps, scores) == keeps).all()


def test_auto_does_not_round_below_the_least_width() -> None:
    classes = classes_of(chain(40, 10))
    keeps, scores = without_lowest(classes, 0, 20)
    limits = width_limits(classes, min_channels=18, channel_multiple="auto")
    assert kept(classes, limits.repaired(keeps, scores))[0] == 20


def test_auto_keeps_the_ratio_where_rounding_would_put_whole_groups_back() -> None:
    # Every class of a grouped convolution owns a position in each group: whatever is wished, half of them must go.
    classes = classes_of(network(["conv_relu", "grouped"], width=24))
    keeps = np.ones(classes.num_classes, dtype=np.bool_)
    for group in classes.groups:
        if group.frozen_reason is None:
            keeps[group.classes[: len(group) // 2]] = False
    limits = width_limits(classes, min_channels=1, channel_multiple="auto")
    repaired = limits.repaired(keeps, np.arange(classes.num_classes, dtype=np.float64))
    for group in classes.groups:
        if group.frozen_reason is None and len(group) > 1:
            assert abs(repaired[group.classes].mean() - keeps[group.classes].mean()) <= 0.125


def test_a_given_multiple_is_a_limit_and_rounds_up() -> None:
    classes = classes_of(chain(40, 10))
    keeps, scores = without_lowest(classes, 0, 23)
    limits = width_limits(classes, min_channels=1, channel_multiple=8)
    assert kept(classes, limits.repaired(keeps, scores))[0] == 24


def test_paying_widths_round_up_to_the_next_that_pays() -> None:
    classes = classes_of(chain(64, 64, 10))
    keeps, scores = without_lowest(classes, 0, 30)
    keeps[classes.widths[1].classes[:30]] = False
    limits = width_limits(
        classes,
        min_channels=1,
        channel_multiple="auto",
        paying_widths={axis_key(classes.widths[0].classes): np.array([16, 48, 64])},
    )
    # The second layer has no entry, and no rounding: every width may be had.
    assert kept(classes, limits.repaired(keeps, scores))[:2] == [48, 34]


def test_the_least_width_is_an_eighth_of_the_width_before() -> None:
    classes = classes_of(chain(64, 10))
    keeps, scores = without_lowest(classes, 0, 63)
    limits = width_limits(classes, min_channels=None, channel_multiple=1, width_before=lambda _: 256)
    assert kept(classes, limits.repaired(keeps, scores))[0] == 32
