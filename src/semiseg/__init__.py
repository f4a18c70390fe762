"""Semi-supervised semantic segmentation: from many images and few masks to a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_PLACES = {
    "semiseg.config": ("Recipe", "load_recipe"),
    "semiseg.data.splits": ("load_data",),
    "semiseg.methods": ("FixMatch", "Supervised"),
    "semiseg.types": ("IGNORE", "InputError"),
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: torch takes seconds, and the command line begins by importing this file.
    if name not in __all__:
        raise AttributeError(f"module 'semiseg' has no attribute '{name}'")
    place = next((place for place, names in _PLACES.items() if name in names), "semiseg.api")
    return getattr(import_module(place), name)


def __dir__() -> list[str]:
    return __all__
