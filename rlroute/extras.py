"""What to say where an optional package is not installed: a command that works for a wheel and for a checkout.

``pip install "rlroute[report]"`` would ask an index for rlroute, which need not be there. The requirements themselves
are, and the metadata of the installed distribution has them.
"""

import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires

from rlroute.errors import MissingDependencyError


def missing(what: str, package: str, instead: str = "") -> MissingDependencyError:
    """Return the error that names a package which is not installed, and the command that installs it with its extra; of
    one that is installed and that something else keeps from being imported, what that is.

    Args:
        what: what needs it, as the subject of a sentence.
        package: the name of its distribution.
        instead: what does without it.
    """
    cause, remedy = sys.exception(), f": pip install {shlex.join(needed_beside(package) or [package])}"
    if isinstance(cause, ImportError) and (cause.name or package).partition(".")[0] != package:
        remedy = f", whose import fails: {cause}"
    return MissingDependencyError("; ".join(filter(None, (f"{what} needs the package {package}{remedy}", instead))))


def needed_beside(package: str) -> list[str]:
    """Return the requirements of the first extra that has a package; none if it is in no extra."""
    for extra, requirements in _extras().items():
        if _plain(package) in map(_distribution, requirements):
            return _without_us(extra)
    return []


def _without_us(extra: str) -> list[str]:
    """Return the requirements of an extra, with those of the extras that it is made of."""
    found = []
    for requirement in _extras()[extra]:
        named = re.search(r"\[(.*)\]", requirement)
        if _distribution(requirement) == "rlroute" and named:
            found += [other for part in named[1].split(",") for other in _without_us(part.strip())]
        else:
            found.append(requirement)
    return found


def _extras() -> dict[str, list[str]]:
    """Return the requirements of each extra, as the metadata of the distribution say; none in a bare checkout."""
    try:
        lines = requires("rlroute") or []
    except PackageNotFoundError:
        lines = []
    extras: dict[str, list[str]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        for extra in re.findall(r"""extra == ["']([^"']+)["']""", marker):
            extras.setdefault(extra, []).append(requirement.strip())
    return extras


def _distribution(requirement: str) -> str:
    return _plain(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
