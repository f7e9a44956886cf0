"""rlroute: compare the routers of mixture-of-experts transformers inside identical models.

``rlroute.compare`` and ``rlroute.judge`` are the commands of these names, and ``rlroute.load_runs`` a store's runs as
a data frame (docs/python.md). They are imported when they are first asked for: the core knows none of the wings.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlroute.config import DataConfig, ModelConfig, TrainConfig
    from rlroute.experiments.comparison.compare import Comparison, compare
    from rlroute.experiments.comparison.frames import load_runs
    from rlroute.experiments.comparison.judge import judge
    from rlroute.experiments.comparison.judgement import Judgement
    from rlroute.experiments.launch.jobs import Launch

try:
    __version__ = version("rlroute")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Comparison",
    "DataConfig",
    "Judgement",
    "Launch",
    "ModelConfig",
    "TrainConfig",
    "__version__",
    "compare",
    "judge",
    "load_runs",
]
_PLACES = {
    "Comparison": "experiments.comparison.compare",
    "DataConfig": "config",
    "Judgement": "experiments.comparison.judgement",
    "Launch": "experiments.launch.jobs",
    "ModelConfig": "config",
    "TrainConfig": "config",
    "compare": "experiments.comparison.compare",
    "judge": "experiments.comparison.judge",
    "load_runs": "experiments.comparison.frames",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
