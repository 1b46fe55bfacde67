"""Tests of results/: the READMEs' tables, and the recipes whose packages are installed."""

import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent
RECIPES = {
    "transformers_mlm": "transformers",
    "trl_grpo": "trl",
    "sb3_ppo": "stable_baselines3",
    "rsl_rl_ppo": "rsl_rl",
}


def test_every_table_is_what_the_csvs_say():
    subprocess.run([sys.executable, RESULTS / "report.py", "--check"], check=True)


@pytest.mark.parametrize(("recipe", "package"), RECIPES.items())
def test_recipe_runs(recipe, package, monkeypatch):
    """It asserts by itself that its first ratio is 1."""
    pytest.importorskip(package)
    monkeypatch.syspath_prepend(RESULTS / "recipes")
    before, after = runpy.run_path(str(RESULTS / "recipes" / f"{recipe}.py"))["train"](0.1, 2)
    assert math.isfinite(before + after)
