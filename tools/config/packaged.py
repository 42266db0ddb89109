"""The recipes that come with the runner, by name. Imports no torch: a list of names is quick."""

import difflib
from pathlib import Path

import itop_prune_recipes


def packaged_recipes() -> dict[str, Path]:
    """List the packaged recipes by name, the quickstart first."""
    paths = Path(itop_prune_recipes.__file__).parent.glob("*.yaml")
    return {path.stem: path for path in sorted(paths, key=lambda p: (p.stem != "quickstart", p))}


def summary(recipe: Path) -> str:
    """Read what a recipe trains: its first line, a comment."""
    with recipe.open(encoding="utf-8") as lines:
        return lines.readline().lstrip("#").strip().rstrip(".")


def find_recipe(given: Path) -> Path:
    """Find a recipe by its path or, if there is no such file, by the name of a packaged one.

    Returns:
        A path of YAML that does not exist is returned as it is, for `read_recipe` to explain.

    Raises:
        FileNotFoundError: It is neither; the message has the nearest names.
    """
    known = packaged_recipes()
    name = str(given)
    if given.is_file():
        return given
    if name in known:
        return known[name]
    if given.stem in known:
        raise FileNotFoundError(
            f"{given}: no such file; the packaged recipe is called {given.stem}, without more"
        )
    if given.suffix or given.exists():
        return given
    raise FileNotFoundError(
        f"{name!r} is neither a file nor a packaged recipe{nearest_recipes(name, known)}; "
        "itop-prune recipes lists them"
    )


def nearest_recipes(name: str, known: dict[str, Path]) -> str:
    """Suggest the names that contain `name`, or else those most similar to it, or return ""."""
    similar = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    found = [other for other in known if name.lower() in other] or similar
    return f" (nearest: {', '.join(found[:3])})" if found else ""
