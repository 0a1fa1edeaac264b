"""Write the lowest version that `pyproject.toml` allows of every dependency, one `name==version` a line, for `pip -c`.

`make test-lowest` installs these and runs the fast tests. A bound that is not a release, or two bounds that exclude
one another, make pip fail, and so does code that needs something newer: then the bound is too low.
"""

from __future__ import annotations

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# name, extras, and the one bound that a dependency of this project has; and where it is wanted
REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(?:>=|==)\s*(?P<version>[0-9][0-9A-Za-z.]*)(?:\s*;.*)?"
)


def lowest_versions(settings: dict[str, Any]) -> dict[str, str]:
    """Name to lowest version, of what the project needs to be built, of its dependencies and of all extras.

    Args:
        settings: a pyproject.toml.

    Raises:
        ValueError: a dependency without exactly one lower bound.
    """
    project = settings["project"]
    extras = project.get("optional-dependencies", {})
    listed = [*settings["build-system"]["requires"], *project["dependencies"], *chain(*extras.values())]
    found: dict[str, str] = {}
    for line in listed:
        if line.startswith(f"{project['name']}["):  # an extra that takes in other extras
            continue
        match = REQUIREMENT.fullmatch(line)
        if match is None:
            raise ValueError(f"{line!r} in pyproject.toml must have one lower bound, such as 'numpy>=1.26'")
        found[match["name"]] = match["version"]
    return found


if __name__ == "__main__":
    with (ROOT / "pyproject.toml").open("rb") as file:
        lowest = lowest_versions(tomllib.load(file))
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in sorted(lowest.items()))
