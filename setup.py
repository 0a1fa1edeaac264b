"""The description that a package index shows: README.md with absolute links; everything else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent


def absolute_links(text: str, repository: str) -> str:
    """Make relative links of a Markdown text absolute: pictures to the file itself, others to its page."""

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match["picture"] else "blob"
        return f"{match['picture']}[{match['text']}]({repository}/{kind}/main/{match['path']})"

    relative = r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<path>(?!https?://|#)[^)\s]+)\)"
    return re.sub(relative, absolute, text)


if __name__ == "__main__":
    from setuptools import setup

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=absolute_links(readme, project["urls"]["Repository"]),
        long_description_content_type="text/markdown",
    )
