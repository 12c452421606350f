"""The recipes that ship with drkl: configs with a name, in place of a path."""

from __future__ import annotations

import os
from pathlib import Path

from drkl.errors import DrklError, did_you_mean

FOLDER = Path(__file__).parent


def recipe_names() -> dict[str, str]:
    """Return the recipes by name, each with the first comment line of its file."""
    return {path.stem: _description(path) for path in sorted(FOLDER.rglob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe, or the path that is given in place of a name.

    A file that exists is that file. Anything else with a folder in it, or ending in .yaml or .yml, is a path too, and
    comes back unchanged. What is left is a name.

    Raises:
        DrklError: no recipe of that name.

    >>> find_recipe("quickstart").name
    'quickstart.yaml'
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {recipe.stem: recipe for recipe in FOLDER.rglob("*.yaml")}
    if path.suffix in (".yaml", ".yml") or path.name != os.fspath(name):
        if not path.exists() and path.parts[:1] == ("recipes",) and path.stem in known:
            raise DrklError(
                f"There is no file {str(path)!r} here. The recipe ships with drkl, by its name: {path.stem}."
            )
        return path
    if path.name not in known:
        raise DrklError(
            f"There is no recipe, and no file, {path.name!r}; the recipes are {', '.join(sorted(known))}."
            f"{did_you_mean(path.name, known)}"
        )
    return known[path.name]


def _description(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
