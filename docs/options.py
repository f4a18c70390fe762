"""Writes docs/options.md from the classes that hold the options: `python docs/options.py`. A test compares the two."""

import re
from pathlib import Path

from semiseg.config import describe

PAGE = Path(__file__).with_suffix(".md")
TITLES = {
    "data": "Data",
    "network": "Network",
    "optim": "Optimiser",
    "train": "Training",
    "evaluate": "Evaluation and prediction",
    "": "The run",
}


def page() -> str:
    """The page: a table for each section of a recipe."""
    text = (
        "# Options\n\n"
        "All options of a recipe but the method's, which stand on the pages of the methods. The same on the command\n"
        "line: `semiseg options [SECTION]...` and `semiseg methods NAME`. They are set in the recipe's sections, or\n"
        "behind `semiseg train` as `train.steps=2000 train.crop=[128,160]`.\n"
    )
    for section, title in TITLES.items():
        text += f"\n## {title}\n\n| option | default | |\n| --- | --- | --- |\n"
        for name, (default, meaning) in describe().items():
            if name.rpartition(".")[0] == section:
                shown = "must be given" if default == "(must be given)" else f"`{default}`"
                text += f"| `{name}` | {shown} | {_escaped(meaning)} |\n"
    return text


def _escaped(text: str) -> str:
    return re.sub(r"([*|$])", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
