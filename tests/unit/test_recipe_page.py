"""The recipe of docs/howto/recipe.md is one that this version reads."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from onnxprune.recipe import decode_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "recipe.md"


def test_the_pages_recipe_is_valid_and_every_section_is_shown() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    recipe = decode_recipe(tomllib.loads(text))
    assert [step.name for step in recipe.steps] == ["simplify", "prune", "quant"]
    assert [target.name for target in recipe.targets] == ["ort-mobile", "onnx"]
    assert recipe.budget.latency_ratio == 0.6
