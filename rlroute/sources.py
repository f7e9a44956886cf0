"""Which files a piece of code is made of, and one SHA-256 over them: rlroute's core; a router and its imports.

Python loads a module once: of a file that changes afterwards, a process goes on with what it had.
"""

import ast
import hashlib
import site
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, resolve_name
from itertools import accumulate
from pathlib import Path
from types import ModuleType

from rlroute.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
WINGS = ("agents", "baselines", "envs", "experiments")
TABLE = "kernels/tiles.json"
"""The one file of the core that is not Python and changes results."""
CODE = frozenset({".py", ".so", ".pyd", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh"})
"""Endings of what is code in somebody else's package."""
_first: dict[Path, bytes] = {}
"""The SHA-256 of each file of code as this process first saw it."""


def digest(contents: Mapping[str, bytes]) -> str:
    """Return the SHA-256 over files, by name and content, whatever their order."""
    sha = hashlib.sha256()
    for name, content in sorted(contents.items()):
        sha.update(f"{name}:{len(content)};".encode() + content)
    return sha.hexdigest()


def remember(paths: Iterable[Path]) -> None:
    """Let :func:`loaded` know what files of code have while this process loads them."""
    for path in paths:
        if path not in _first:
            with suppress(OSError):  # whoever needs it says so
                _first[path] = hashlib.sha256(path.read_bytes()).digest()


def loaded(files: Mapping[str, Path]) -> dict[str, bytes]:
    """Return what files of code have, which is what this process has loaded of them.

    Raises:
        ConfigError: one was changed since: the code that runs is not the one that lies there.
        OSError: one cannot be read.
    """
    contents = {name: path.read_bytes() for name, path in files.items()}
    for name, path in files.items():
        sha = hashlib.sha256(contents[name]).digest()
        if _first.setdefault(path, sha) != sha:
            raise ConfigError(f"{path} was changed since this process loaded it: want a new process")
    return contents


def of_core(name: str) -> bool:
    """Whether a file, by its path below the package, belongs to the core: Python outside of the wings, and the tile
    table.
    """
    return name == TABLE or (name.endswith(".py") and name.partition("/")[0] not in WINGS)


def core_files(package: Path = PACKAGE) -> dict[str, Path]:
    """Return the files of rlroute's core by their paths below the package."""
    folders = [path for path in package.iterdir() if path.name not in WINGS and path.is_dir()]
    paths = [*package.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py")), package / TABLE]
    return {path.relative_to(package).as_posix(): path for path in paths if path.is_file()}


def core_sha256() -> str:
    """Return the SHA-256 over the core's files.

    Raises:
        ConfigError: one was changed since this process loaded the core.
    """
    return digest(loaded(core_files()))


def package_files(package: Path = PACKAGE) -> list[Path]:
    """Return all files of the package that are code, those of the wings included, where they really lie."""
    wings = [(package / wing).resolve() for wing in WINGS]
    return [*core_files(package).values(), *(path for wing in wings for path in wing.rglob("*.py"))]


def router_files(module: ModuleType, shipped: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files of a router's code but for rlroute's core, by names that are the same on every machine.

    These are its module; its whole package, and what its distribution ships, where it is not ours; and what these
    import from rlroute's wings, from the same package, or from any place where no distributions are installed, as are
    the files of one that is installed as editable. Of any other distribution that it imports nothing is taken.

    Args:
        module: the module that defines the router.
        shipped: files of the distribution that it comes from, by its own names.
    """
    top = module.__name__.partition(".")[0]
    found = _imported(module.__name__, Path(str(module.__file__)), top)
    if top != "rlroute":
        for folder in map(Path, getattr(_spec(top), "submodule_search_locations", None) or ()):
            found |= {p.relative_to(folder.parent).as_posix(): p for p in folder.rglob("*") if p.suffix in CODE}
        found |= {name: path for name, path in shipped.items() if path.suffix in CODE and path.is_file()}
    return found


def _imported(name: str, file: Path, top: str) -> dict[str, Path]:
    """Return the files of a module and of the modules it stands on, by the modules' names."""
    found: dict[str, Path] = {}
    waiting = [(name, file)]
    while waiting:
        name, file = waiting.pop()
        if name not in found:
            found[name] = file
            whole = {part for other in _imports(name, file) for part in accumulate(other.split("."), "{}.{}".format)}
            places = ((other, _origin(other)) for other in sorted(whole) if _is_followed(other, top))
            waiting += [(other, place) for other, place in places if place is not None]
    return found


def _imports(name: str, file: Path) -> Iterator[str]:
    """Yield the names of all that may be a module among what a source imports."""
    if file.suffix != ".py":
        return
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # its file was edited after it was loaded
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):  # it would fail if it were run
                base = resolve_name("." * node.level + (node.module or ""), package)
                yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def _is_followed(name: str, top: str) -> bool:
    """Whether a module's code belongs to a router of the package ``top``, whose first names alone are looked up."""
    first, _, rest = name.partition(".")
    if first == "rlroute":
        return rest.partition(".")[0] in WINGS
    if first == top:
        return True
    spec = _spec(first)
    places = (spec and spec.submodule_search_locations) or filter(None, [_origin(first)])
    return not all(_is_installed(Path(place).parent) for place in places)


@cache
def _is_installed(folder: Path) -> bool:
    """Whether distributions are installed in a folder, or it is the standard library's."""
    return not _installed().isdisjoint(map(str, (folder, *folder.parents))) or any(folder.glob("*.dist-info"))


@cache
def _installed() -> frozenset[str]:
    """Return the folders of the standard library and of what Python itself finds installed."""
    paths = sysconfig.get_paths()
    return frozenset(
        {paths["purelib"], paths["platlib"], paths["stdlib"], *site.getsitepackages(), site.getusersitepackages()}
    )


def _spec(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except Exception:  # there is none, or a package around it, which is imported for this, may fail in any way
        return None


def _origin(name: str) -> Path | None:
    spec = _spec(name)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


remember(core_files().values())  # most of the core is loaded after this module
