"""The page for PyPI: the README, with links that lead somewhere from there.

All else is in pyproject.toml. PyPI resolves no relative link and holds no picture, so both get the
address `Repository` of [project.urls]. Without one a link becomes its text, and a picture the text
that describes it.
"""

import re
import sys
from pathlib import Path

from setuptools import setup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RELATIVE = r"(?!https?:|#)([^)\s\"]+)"


def for_pypi(readme: str, repository: str | None) -> str:
    """Make relative links and pictures of a README absolute, or replace them by their text."""

    def replaced(match: re.Match[str]) -> str:
        picture, text, path = match.groups()
        if repository:
            kind = "raw" if picture else "blob"
            return f"{picture}[{text}]({repository}/{kind}/HEAD/{path})"
        return f"*Picture: {text}*" if picture else text

    parts = re.split(r"(^```.*?^```$)", readme, flags=re.MULTILINE | re.DOTALL)
    for number in range(0, len(parts), 2):  # between the blocks of code
        tag = rf'<img src="{RELATIVE}"[^>]* alt="([^"]*)"[^>]*>'
        plain = re.sub(tag, r"![\2](\1)", parts[number])
        parts[number] = re.sub(rf"(!?)\[([^\]]*)\]\({RELATIVE}\)", replaced, plain)
    return "".join(parts)


if __name__ == "__main__":
    here = Path(__file__).parent
    project = tomllib.loads((here / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = for_pypi(
        (here / "README.md").read_text(encoding="utf-8"), project["urls"].get("Repository")
    )
    setup(long_description=page, long_description_content_type="text/markdown")
