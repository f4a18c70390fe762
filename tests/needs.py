"""Options that methods cannot be without, for tests that go through all methods."""

from pathlib import Path
from typing import Any

from semiseg import testing


def needed(method: str, folder: Path) -> dict[str, Any]:
    """Options that a method cannot be without, and the files that they name, in `folder`."""
    if method != "transfer":
        return {}
    if not (folder / "source").exists():
        testing.write_data(folder / "source", 6)
    (folder / "classes.yml").write_text("floor: ground\nobject: thing\nodd: null\n")
    names = ["floor", "object", "odd"]
    source = {"root": str(folder / "source"), "format": "splits", "classes": names, "scale": [1, 1], "cache": False}
    return {"source": source, "classes": str(folder / "classes.yml")}
