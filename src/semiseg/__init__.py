"""Semi-supervised semantic segmentation: from many images and few masks to a model."""

from semiseg.api import Model, check, compare, evaluate, export, load, predict, run, train
from semiseg.config import Recipe, load_recipe
from semiseg.data.splits import load_data
from semiseg.methods import FixMatch, Supervised
from semiseg.types import IGNORE, InputError

__all__ = [
    "IGNORE",
    "FixMatch",
    "InputError",
    "Model",
    "Recipe",
    "Supervised",
    "check",
    "compare",
    "evaluate",
    "export",
    "load",
    "load_data",
    "load_recipe",
    "predict",
    "run",
    "train",
]
