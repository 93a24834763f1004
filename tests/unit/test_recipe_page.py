"""The recipes of docs/howto are ones that this version reads."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from onnxprune.contracts import Iteration, ModelState
from onnxprune.recipe import Repeat, decode_recipe
from tests.builders import conv_net

HOWTO = Path(__file__).resolve().parents[2] / "docs" / "howto"


def test_the_pages_recipe_is_valid_and_every_section_is_shown() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", (HOWTO / "recipe.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    recipe = decode_recipe(tomllib.loads(text))
    assert [step.name for step in recipe.steps] == ["simplify", "prune", "quant"]
    assert [target.name for target in recipe.targets] == ["ort-mobile", "onnx"]
    assert recipe.budget.latency_ratio == 0.6


def test_the_blocks_of_the_page_about_repeat_are_valid() -> None:
    text = (HOWTO / "repeat.md").read_text(encoding="utf-8").replace('"acme-finetune"', '"simplify"')
    recipes = [decode_recipe(tomllib.loads(block)) for block in re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)]
    blocks = [step for recipe in recipes for step in recipe.steps if isinstance(step, Repeat)]
    assert [(block.times, block.score_drop) for block in blocks] == [(4, None), (10, 0.01)]


def test_the_schedules_of_the_page_about_repeat_are_those_of_the_code() -> None:
    text = (HOWTO / "repeat.md").read_text(encoding="utf-8")
    original = ModelState(model=conv_net())
    for schedule in ("linear", "geometric"):
        (row,) = [line for line in text.splitlines() if line.startswith(f'| `"{schedule}"`')]
        shown = [float(number) for number in row.split("|")[-2].split(",")]
        reached = [
            Iteration(number=number, times=4, original=original, schedule=schedule).ratio_by_now(0.5)
            for number in (1, 2, 3, 4)
        ]
        assert shown == [round(ratio, 3) for ratio in reached]
