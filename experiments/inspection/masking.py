"""A model without some of its experts: what each is worth.

A masked expert's logit is minus infinity and no token is given to it: tokens choose among the others, and gates are
those of the others, as in a model that was built without it (DeepSeekMoE, arXiv 2401.06066, section 4.5, masks so). Of
a router without logits (:class:`.routing.Router` says which module makes them) the choice alone is among the others;
of one that does not rank either, a table of hashes say, a masked expert's pairs do not run. Capacities stay those of
all experts.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlroute.errors import ConfigError
from rlroute.model import Transformer
from rlroute.model.moe import MoELayer
from rlroute.model.transformer import RoutedSite
from rlroute.routing import Router, RoutingContext, RoutingDecision, Site
from rlroute.sampling import top_k

LOWEST = torch.finfo(torch.float32).min
"""What is chosen by where an expert is masked: a token short of others gets it, and its pair does not run; minus
infinity would leave the slot unused, which not every router knows.
"""


@dataclass(frozen=True)
class Mask:
    """What a site does without.

    Attributes:
        experts: these, for all tokens.
        best: of each token, its so many best.
        shared: the experts that all tokens share.
    """

    experts: Sequence[int] = ()
    best: int = 0
    shared: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class _Masked(RoutingContext):
    """A context in which experts are not to be chosen.

    Attributes:
        mask: which.
        hidden_TE: what they are token by token, once something has ranked them; a list of one.
        logits_TE: as they were before; a list of one, where there are any.
    """

    mask: Mask
    hidden_TE: list[Tensor] = field(default_factory=list)
    logits_TE: list[Tensor] = field(default_factory=list)

    def hide(self, scores_TE: Tensor, value: float) -> Tensor:
        """Return scores in which masked experts have a value, by their own ranking if there was none before."""
        if not self.hidden_TE:
            hidden_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
            hidden_TE[:, list(self.mask.experts)] = True
            if self.mask.best:
                hidden_TE.scatter_(1, top_k(scores_TE.detach(), self.mask.best), True)
            self.hidden_TE.append(hidden_TE)
        return scores_TE.masked_fill(self.hidden_TE[0], value)

    def choose(self, scores_TE: Tensor, k: int) -> Tensor:
        """Choose among the experts that are not masked; where experts choose tokens, leave them their choice."""
        return super().choose(self.hide(scores_TE, LOWEST) if len(scores_TE) == len(self.token_ids_T) else scores_TE, k)


@contextmanager
def masked(model: Transformer, masks: Mapping[Site, Mask]) -> Iterator[None]:
    """Let a model do without experts in the block.

    Args:
        model: its parameters stay as they are.
        masks: by site.

    Raises:
        ConfigError: there is no such site or expert, or none would be left.
    """
    sites = {site.router.shape.site: site for site in model.routed}
    for key, mask in masks.items():
        if key not in sites:
            raise ConfigError(f"site {key}: legal are {', '.join(map(str, sites))}")
        _refuse(sites[key].router, mask)
    with ExitStack() as undo:
        for key, mask in masks.items():
            if mask.experts or mask.best:
                _hide(sites[key].router, mask, undo)
            if mask.shared:
                _leave_out_shared(sites[key], key, undo)
        yield


def _refuse(router: Router, mask: Mask) -> None:
    shape = router.shape
    if wrong := [expert for expert in mask.experts if not 0 <= expert < shape.num_experts]:
        raise ConfigError(f"expert {wrong[0]} of site {shape.site}: legal are 0 to {shape.num_experts - 1}")
    most = shape.num_experts - shape.k
    if len(set(mask.experts)) + mask.best > most:
        raise ConfigError(
            f"{len(set(mask.experts)) + mask.best} experts of site {shape.site} cannot be masked: {shape.num_experts} "
            f"with k = {shape.k} can do without {most}"
        )


def _hide(router: Router, mask: Mask, undo: ExitStack) -> None:
    """Put hooks around a router, and around what makes its logits, which sites may have in common."""
    running: list[_Masked] = []

    def enter(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD, context = inputs
        values = {f.name: getattr(context, f.name) for f in fields(RoutingContext)}
        running.append(_Masked(**values, mask=mask))
        return x_TD, running[0]

    def logits(module: Any, inputs: Any, logits_TE: Tensor) -> Tensor:
        if not running or logits_TE.shape[1] != router.shape.num_experts:
            return logits_TE
        running[0].logits_TE.append(logits_TE)
        return running[0].hide(logits_TE, float("-inf"))

    def leave(module: Any, inputs: Any, decision: RoutingDecision) -> RoutingDecision:
        return _without(decision, running.pop())

    hooks = [router.register_forward_pre_hook(enter), router.register_forward_hook(leave)]
    if isinstance(scores := getattr(router, "scores", None), torch.nn.Module):
        hooks.append(scores.register_forward_hook(logits))
    for hook in hooks:
        undo.callback(hook.remove)


def _without(decision: RoutingDecision, context: _Masked) -> RoutingDecision:
    """Return a decision in which no pair of a masked expert is left, with logits that later sites may read."""
    if not context.hidden_TE:  # nothing was ranked by expert
        if context.mask.best:
            raise ConfigError(f"site {context.site}: its router ranks no experts, so no token has a best one")
        context.hide(decision.gates_R.new_zeros(decision.num_tokens, decision.num_experts), 0.0)
    if context.logits_TE and decision.logits_TE is not None:
        clean_TE = torch.where(context.hidden_TE[0], context.logits_TE[0].to(decision.logits_TE), decision.logits_TE)
        decision = replace(decision, logits_TE=clean_TE)
    hidden_TE = torch.nn.functional.pad(context.hidden_TE[0], (0, 1))
    return replace(decision, kept_R=decision.kept_R & ~hidden_TE[decision.token_ids_R, decision.expert_ids_R])


def _leave_out_shared(site: RoutedSite, key: Site, undo: ExitStack) -> None:
    if not isinstance(site, MoELayer) or (shared := site.shared) is None:
        raise ConfigError(f"site {key} has no shared experts to mask")
    site.shared = None
    undo.callback(setattr, site, "shared", shared)
