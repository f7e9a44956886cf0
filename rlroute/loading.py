"""From a file, a module or an entry point to the router in it; or one line that says why there is none, and where."""

import inspect
import linecache
import os
import platform
import sys
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from rlroute.config import RouterConfig
from rlroute.errors import ConfigError, RlrouteError
from rlroute.extras import missing
from rlroute.faults import explain, place
from rlroute.routing import Router
from rlroute.values import needed_fields

Source = str | EntryPoint | Path
"""A module's path, an entry point that a distribution declares, or a file from anywhere. Where the package
importlib_metadata is imported, entry points are of a class of its own: ask for the other two.
"""
PREFIX = "rlroute_included"
"""The modules of files from anywhere are called so, and then by the router's name: no other module is hidden."""


def load(name: str, source: Source) -> type[Router]:
    """Return the router called ``name``.

    Raises:
        ConfigError: it does not define exactly one router of that name, or fails when it is imported; the message has
            file and line.
        MissingDependencyError: it imports a package that is not installed.
    """
    router = None
    try:
        router = _class_in(name, source)
        _check(name, router)
    except RlrouteError as error:
        raise type(error)(f"{error} ({_line_of(router) or file_of(source) or source})") from error
    except (Exception, SystemExit) as error:  # a file from outside may fail in any way
        raise _cannot_be_loaded(name, source, error) from error
    return router


def checked_path(file: str | Path) -> Path:
    """Return the absolute path of a router's file.

    Raises:
        ConfigError: there is no file, or its name cannot be a router's.
    """
    path = Path(file).expanduser().absolute()
    if path.suffix != ".py" or not path.stem.isidentifier() or os.pathsep in str(path):
        raise ConfigError(
            f"router file {path}: want NAME.py, where NAME is the router's and has letters, digits and _ alone, "
            f"in a folder without {os.pathsep!r}"
        )
    if not path.is_file():
        raise ConfigError(f"router file {path}: there is no such file on {platform.node() or 'this machine'}")
    return path


def file_of(source: Source) -> Path | None:
    """Return the file of a source, None where that cannot be said."""
    if isinstance(source, Path):
        return source
    with suppress(Exception):  # a package around it is imported for this, and may be broken
        spec = find_spec(source if isinstance(source, str) else source.value.partition(":")[0])
        return Path(spec.origin) if spec and spec.origin else None
    return None


def _class_in(name: str, source: Source) -> type[Router]:
    if isinstance(source, str):
        return _only_router(import_module(source))
    if isinstance(source, Path):
        return _only_router(_module_at(source))
    router = source.load()
    if not (inspect.isclass(router) and issubclass(router, Router)):
        raise ConfigError(
            f"entry point {name!r} of group rlroute.routers is {router!r}: want a subclass of rlroute.routing.Router"
        )
    return router


def _module_at(path: Path) -> ModuleType:
    """Return the module of a file, run once in a process; never from a cache of compiled files, which goes by times."""
    name = f"{PREFIX}.{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    spec = spec_from_file_location(name, path)
    assert isinstance(spec, ModuleSpec)
    sys.modules.setdefault(PREFIX, ModuleType(PREFIX))  # which pickle looks for
    sys.modules[name] = module = module_from_spec(spec)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _only_router(module: ModuleType) -> type[Router]:
    routers = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Router) and value.__module__ == module.__name__
    ]
    routers = list(dict.fromkeys(routers))  # a class may have two names
    if len(routers) != 1:
        names = f" ({', '.join(router.__name__ for router in routers)})" if routers else ""
        raise ConfigError(f"{module.__name__} defines {len(routers)} routers{names}: a file holds exactly one")
    return routers[0]


def _check(name: str, router: type[Router]) -> None:
    """Refuse a router whose ``Config`` could not be used, before any work."""
    config: Any = getattr(router, "Config", None)
    if not (inspect.isclass(config) and issubclass(config, RouterConfig)):
        raise ConfigError(f"router {name!r} has no class Config(RouterConfig) inside {router.__name__}")
    if config.name != name:
        raise ConfigError(f"router {name!r} is defined in a file called {config.name!r}: the names must agree")
    lost = [field for field in inspect.get_annotations(config) if field not in config.__dataclass_fields__]
    if lost:
        raise ConfigError(
            f"router {name!r}: {lost[0]} is no field of its Config, which lacks @dataclass(frozen=True, kw_only=True)"
        )
    get_type_hints(config, include_extras=True)
    if not needed_fields(config):
        config()


def _line_of(router: type[Router] | None) -> str | None:
    """Return file and line where a router's class begins, None where there is no class or no source."""
    if router is None:
        return None
    with suppress(OSError, TypeError):
        linecache.checkcache()
        return f"{inspect.getsourcefile(router)}, line {inspect.getsourcelines(router)[1]}"
    return None


def _cannot_be_loaded(name: str, source: Source, error: BaseException) -> RlrouteError:
    """Return what to say of a source that failed."""
    file = file_of(source)
    files = {str(file)} if file else set()
    what = f"router {name!r}{'' if isinstance(source, str | Path) else f' of {source.value}'}"
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not package or package == "rlroute" or _is_here(package):
        return ConfigError(f"{what} cannot be loaded: {explain(error, files)}")
    if isinstance(source, Path) and list(source.parent.glob(f"{package}*")):
        return ConfigError(
            f"{what} ({place(error, files)}) imports {package} from its folder: a router is one file, and what else it "
            "imports is installed"
        )
    return missing(f"{what} ({place(error, files)})", package)


def _is_here(package: str) -> bool:
    with suppress(ImportError, ValueError):
        return find_spec(package) is not None
    return False
