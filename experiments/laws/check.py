"""One router held to all laws, in each of its configurations: what ``rlroute check`` prints."""

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from rlroute.config import RouterConfig
from rlroute.errors import ConfigError
from rlroute.experiments.laws import contract
from rlroute.experiments.laws.cases import Case, cases
from rlroute.faults import explain, message
from rlroute.registry import router_class, router_file
from rlroute.routing import Router

Law = Callable[[Case], None]


@dataclass
class Verdict:
    """What became of a law.

    Attributes:
        law: its name.
        passed: configurations that keep it, as entries.
        failed: those that do not, each with the reason, which has file and line.
        refused: those that refuse the shapes which the law wants.
    """

    law: str
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def outcome(self) -> Literal["pass", "FAIL", "refused"]:
        """In a word."""
        return "FAIL" if self.failed else "pass" if self.passed else "refused"

    def __str__(self) -> str:
        label = next(iter(self.failed or self.refused), "")
        several = f"{len(self.failed)} configurations, the first is " if len(self.failed) > 1 else ""
        why = f"  {several}{label}: {(self.failed or self.refused)[label]}" if label else ""
        return f"{self.outcome:8} {self.law:22}{why}".rstrip()


def check_router(config: RouterConfig) -> Iterator[Verdict]:
    """Yield the verdict of each law on a router: on this configuration, and on those that differ from it in one choice.

    Raises:
        ConfigError: it refuses all shapes that are tried, or Python leaves assertions out.
    """
    if not __debug__:
        raise ConfigError("python -O leaves out the assertions that laws are made of")
    torch.set_num_threads(1)
    router = router_class(config.name)
    if (file := router_file(config.name)) is None:
        raise ConfigError(f"router {config.name!r} has no file")
    tried = list(cases(router, config))
    _ = tried[0].shapes  # there must be one
    for law in contract.LAWS:
        verdict = Verdict(law.__name__.removeprefix("law_"))
        for case in tried:
            _judge(law, case, file, verdict)
        yield verdict


def _judge(law: Law, case: Case, file: str, verdict: Verdict) -> None:
    try:
        law(case)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ConfigError) and _refuses(frames):
            verdict.refused[case.label] = str(error)
        else:
            verdict.failed[case.label] = _reason(law, error, frames, file)
    else:
        verdict.passed.append(case.label)


def _refuses(frames: Sequence[traceback.FrameSummary]) -> bool:
    """Whether a router refused a shape by :meth:`rlroute.routing.Router.refuses`, as it was built or before."""
    return frames[-1].filename in map(inspect.getsourcefile, (Router, Case))


def _reason(law: Law, error: Exception, frames: Sequence[traceback.FrameSummary], file: str) -> str:
    if not isinstance(error, AssertionError) or frames[-1].filename != contract.__file__:
        inside = any(frame.filename == file for frame in frames)
        return explain(error, {file if inside else contract.__file__})
    what = " ".join((law.__doc__ or "").split())
    said = message(error) or (frames[-1].line or "")
    return " ".join(filter(None, (what, f"[{said}]", f"({frames[-1].filename}, line {frames[-1].lineno})")))
