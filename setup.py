"""Build rlroute: the folders agents/, baselines/, envs/ and experiments/ ship as rlroute.agents and so on.

The links rlroute/<wing> -> ../<wing> say the same to whatever reads the checkout without installing it;
tests/test_house.py keeps the two equal.
"""

from pathlib import Path

from setuptools import find_packages, setup

WINGS = ("agents", "baselines", "envs", "experiments")
core = find_packages(include=["rlroute", "rlroute.*"], exclude=[f"rlroute.{wing}*" for wing in WINGS])
wings = find_packages(include=[pattern for wing in WINGS for pattern in (wing, f"{wing}.*")])
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "constraints.txt",
    *map(str, Path("docs").glob("*.md")),
]
setup(
    packages=core + [f"rlroute.{package}" for package in wings],
    package_dir={f"rlroute.{wing}": wing for wing in WINGS},
    data_files=[("share/doc/rlroute", PAGES)],
)
