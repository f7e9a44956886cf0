"""rlroute: compare the routers of mixture-of-experts transformers inside identical models."""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

try:
    __version__ = version("rlroute")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


class _WhenGymnasiumLoads:
    """An import hook that registers the environments once Gymnasium is loaded, and then is gone.

    ``gym.make("rlroute:rlroute/...")`` imports this package for the sake of its registrations, and Gymnasium has had no plugin entry
    point since 1.0. Importing Gymnasium here would cost every command a fifth of a second; registering only if it is loaded already
    would fail whoever imports rlroute first.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "gymnasium":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self._load, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _load(self, load: Callable[[ModuleType], None], module: ModuleType) -> None:
        load(module)
        sys.meta_path.remove(self)  # not before: a spec may be asked for without loading anything
        importlib.import_module("rlroute.envs")


if sys.modules.get("gymnasium") is not None:
    importlib.import_module("rlroute.envs")
else:
    sys.meta_path.insert(0, _WhenGymnasiumLoads())
