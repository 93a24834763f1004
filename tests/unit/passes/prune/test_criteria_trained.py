"""On a trained network, every criterion that looks at something does better than chance."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from onnxprune.contracts import CanonicalModel, ModelState, PassContext
from onnxprune.passes.harness import run_pass
from onnxprune.passes.prune import PruneConfig, PrunePass
from onnxprune.passes.prune.criteria import CRITERIA
from tests import digits_resnet

RANDOM_SEEDS = 3


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients of the trained classifier on eight minibatches of training digits."""
    file = tmp_path_factory.mktemp("gradients") / "digits.npz"
    np.savez(file, **digits_resnet.gradients(8))
    return file


@cache
def classifier() -> CanonicalModel:
    return digits_resnet.classifier()


def top1(criterion: str, ranking: Literal["per-layer", "global"], *, seed: int = 0, **settings: Any) -> float:
    """Share of the test digits named rightly with half of the channels removed, and no training after it."""
    config = PruneConfig(
        criterion=criterion, ranking=ranking, ratio=0.5, min_channels=1, channel_multiple=1, **settings
    )
    context = PassContext(seed=seed, calibration=digits_resnet.Calibration())
    return digits_resnet.top1(run_pass(PrunePass(config), ModelState(model=classifier()), context).state.model)


@cache
def best_of_chance(ranking: Literal["per-layer", "global"]) -> float:
    return max(top1("random", ranking, seed=seed) for seed in range(RANDOM_SEEDS))


@pytest.mark.parametrize("ranking", ["per-layer", "global"])
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_a_criterion_keeps_more_of_the_accuracy_than_chance(
    criterion: str, ranking: Literal["per-layer", "global"], gradients: Path
) -> None:
    settings = {"gradients": str(gradients)} if CRITERIA[criterion].needs == "gradients" else {}
    # The unpruned network names all test digits rightly; chance leaves about one in ten.
    assert top1(criterion, ranking, **settings) > best_of_chance(ranking) + 0.2
