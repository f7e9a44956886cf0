"""Our routers beside the published classes of transformers, and how far apart they are: ``python -m tests.parity``
prints docs/parity.md.

Shape suffixes: T tokens, D model width, E experts, K experts per token, S shared experts.
"""

import importlib
import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlroute.baselines.zaya import STATE
from rlroute.experiments.checkpoints.blocks import FORMATS
from rlroute.experiments.recipes.entries import router_of
from rlroute.registry import router_class
from rlroute.routing import Router, RoutingContext, RoutingDecision
from tests.conftest import make_context, make_shape
from tests.published import AWAITED, NO_ROUTERS, ROWS, SETTINGS, D, E, K, Row

T = 257
SHIFTS = (0.0, -2.0)
"""What is added to random biases of the choice: under the second every sigmoid that is chosen by is negative."""
_OF_ZAYA = {
    "balancing_biases": "bias_E",
    "router_states_scale": "carry_R",
    "down_proj.weight": "down.weight",
    "down_proj.bias": "down.bias",
    "router_mlp.norm.weight": "scores.norm.weight",
    "router_mlp.fc1.weight": "scores.first.weight",
    "router_mlp.fc1.bias": "scores.first.bias",
    "router_mlp.fc2.weight": "scores.second.weight",
    "router_mlp.fc2.bias": "scores.second.bias",
    "router_mlp.out_proj.weight": "scores.last.weight",
}
TIED = 1e-6
"""Experts whose scores are no further apart may come in any order."""
_LENGTHS = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
_NAMES = {"bias": "scores.bias", "per_expert_scale": "scale_E", "e_score_correction_bias": "bias_E"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Watching(RoutingContext):
    """A context that remembers what a router ranked."""

    ranked: list[Tensor] = field(default_factory=list)

    def choose(self, scores_TE: Tensor, k: int) -> Tensor:
        self.ranked.append(scores_TE)
        return super().choose(scores_TE, k)


class Distance(NamedTuple):
    """How far a published class and ours are apart on random inputs.

    Attributes:
        gates: the largest difference between two gates of a token that is not tied.
        sets: tokens that are not tied and have other experts.
        tied: tokens whose last chosen and first unchosen experts have the same score.
    """

    gates: float
    sets: int
    tied: int


def measure(row: Row, shift: float) -> Distance:
    """Return how far a row's two routers are apart, with the same random weights, inputs and biases."""
    theirs = build(row)
    shake(theirs, shift)
    bias_E = 0.1 * _draw(E, seed=1) + shift
    x_TD = _draw(T, D, seed=2)
    with torch.no_grad():
        want_TE, wanted = call(theirs, x_TD.clone(), bias_E)
        router = ours(row)
        copy_weights(theirs, bias_E if wanted else None, router)
        context = Watching(**vars(make_context(T, explore=False, earlier={0: _with_state()})))
        decision = router(x_TD, context)
        got_TE = dense(decision)
        if row.published == "zaya.ZayaRouter":
            assert bool(got_TE[:, -1].any()), "no token skips"
            got_TE[:, -1] = 0  # there one that does has no gate
    ranked_TE = context.ranked[0] if context.ranked else decision.logits_TE
    best_TE = ranked_TE.sort(dim=1, descending=True).values
    clear_T = best_TE[:, row.k - 1] - best_TE[:, row.k] > TIED
    apart_TE = (want_TE - got_TE)[clear_T]
    other_T = ((want_TE != 0) != (got_TE != 0)).any(1) & clear_T
    return Distance(float(apart_TE.abs().max()) if len(apart_TE) else 0.0, int(other_T.sum()), int((~clear_T).sum()))


def build(row: Row) -> nn.Module:
    """Return the published module of a row."""
    settings = SimpleNamespace(**SETTINGS | dict.fromkeys(_LENGTHS, row.k) | row.settings)
    folder, _, name = row.published.partition(".")
    file = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    cls = getattr(file, name)
    if name == "JetMoeTopKGating":
        return cls(D, E, row.k)
    if name == "ZayaRouter":
        return cls(settings, 1)
    if name == "DbrxFFN":  # without its experts
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.router, block.top_k = file.DbrxRouter(settings), row.k
        block.moe_normalize_expert_weights = settings.moe_normalize_expert_weights
        return block
    return cls(settings)


def ours(row: Row) -> Router:
    """Return our router of a row."""
    config = router_of(row.entry)
    assert config is not None
    shared = row.settings.get("n_shared_experts", 0)
    return router_class(config.name)(config, make_shape(E, row.k, d_model=D, num_shared_experts=shared, site_index=1))


def shake(module: nn.Module, shift: float) -> None:
    """Give every parameter and buffer of a module random values; biases of the choice are shifted besides."""
    module.eval()
    for seed, (name, tensor) in enumerate(module.state_dict().items()):
        values = _draw(*tensor.shape, seed=10 + seed)
        if not tensor.is_floating_point():  # a table of experts
            values = _draw(len(tensor), E, seed=10 + seed).argsort(1)[:, : tensor.shape[1]]
        elif "correction_bias" in name or "balancing" in name:
            values = 0.1 * values + shift
        elif "scale" in name or "norm" in name:
            values = 1 + 0.1 * values
        else:
            values = values * (1.7 * tensor.shape[1] ** -0.5 if tensor.dim() == 2 else 0.3)
        tensor.copy_(values)


def copy_weights(module: nn.Module, bias_E: Tensor | None, router: Router) -> None:
    """Copy what a published module has into our router: all of it.

    Args:
        module: the published one.
        bias_E: the bias of the choice, where the module is called with it.
        router: ours.
    """
    if type(module).__name__ == "ZayaRouter":
        router.load_state_dict({_OF_ZAYA[name]: tensor for name, tensor in module.state_dict().items()})
        return
    state = {name.rpartition(".")[2]: tensor for name, tensor in module.state_dict().items()}
    weight_ED = state.pop("weight")
    if "scale" in state:  # of the normalised input, element by element: here a part of the matrix
        weight_ED = weight_ED * state.pop("scale") * D**-0.5
    taken = {"scores.weight": weight_ED[:E]} | ({"shared_SD": weight_ED[E:]} if len(weight_ED) > E else {})
    if "global_scale" in state:
        taken["scale"] = state.pop("global_scale").squeeze()
    taken |= {new: state.pop(old).flatten() for old, new in _NAMES.items() if old in state}
    if "tid2eid" in state:
        taken["table_XK"] = state.pop("tid2eid")
    assert not state, f"{type(module).__name__} has {', '.join(state)} besides: what are they of ours?"
    router.load_state_dict(taken | ({} if bias_E is None else {"bias_E": bias_E}))


def call(module: Any, x_TD: Tensor, bias_E: Tensor) -> tuple[Tensor, bool]:
    """Return the gates of a published module, of shape (T, E), 0 where an expert is not chosen; and whether it was
    called with the bias.
    """
    name = type(module).__name__
    if name == "DbrxFFN":
        gates_TK, ids_TK = module.route_tokens_to_experts(module.router(x_TD))
        return _of_ids(x_TD, gates_TK, ids_TK), False
    if name == "ZayaRouter":
        _, gates_TK, ids_TK, _ = module(x_TD[None], _with_state().memo[STATE][None])
        return _of_ids(x_TD, gates_TK, ids_TK), False
    wanted = list(inspect.signature(module.forward).parameters)
    wants_bias, wants_ids = any("bias" in argument for argument in wanted), "input_ids" in wanted
    rows = x_TD[None] if name.startswith("Afmoe") else x_TD  # which reads three dimensions
    out = module(rows, *[bias_E] * wants_bias, *[make_context(T).token_ids_T] * wants_ids)
    return _READ.get(name, _of_ids)(*out), wants_bias


def dense(decision: RoutingDecision) -> Tensor:
    """Return the gates of a decision, 0 where an expert is not chosen, and behind them those of shared experts, if it
    has any; shape (T, E) or (T, E + S).
    """
    gates_TE = torch.zeros(T, E).index_put((decision.token_ids_R, decision.expert_ids_R), decision.gates_R)
    return gates_TE if decision.shared_gates_TS is None else torch.cat([gates_TE, decision.shared_gates_TS], 1)


def _with_state() -> RoutingDecision:
    """Return a decision of the site before, which hands on a state as ZAYA's routers do."""
    ids_TK = torch.zeros(T, 1, dtype=torch.long)
    return RoutingDecision.token_choice(ids_TK, torch.ones(T, 1), E, memo={STATE: _draw(T, 16, seed=3)})


def _of_ids(_: Tensor, gates_TK: Tensor, ids_TK: Tensor) -> Tensor:
    return torch.zeros(T, E).scatter(1, ids_TK, gates_TK)


def _of_pairs(order_R: Tensor, token_R: Tensor, gates_R: Tensor, sizes: list[int], _: Tensor) -> Tensor:
    """Read JetMoE's answer: pairs in the order of their experts."""
    expert_R = torch.arange(E).repeat_interleave(torch.tensor(sizes))
    return torch.zeros(T, E).index_put((token_R, expert_R), gates_R)


_READ: dict[str, Any] = {
    "InklingTopkRouter": lambda _, gates_TK, ids_TK, shared_TS: torch.cat([_of_ids(_, gates_TK, ids_TK), shared_TS], 1),
    "JetMoeTopKGating": _of_pairs,
    "Llama4Router": lambda scores_TE, logits_TE: scores_TE,
    "NllbMoeTop2Router": lambda first_TE, gates_TE, logits_TE: gates_TE,
    "SwitchTransformersTop1Router": lambda chosen_TE, gate_T1, logits_TE: chosen_TE * gate_T1,
}
"""What makes gates of an answer that is not logits, gates and ids."""


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HEAD = """# Parity with the routers of transformers {version}

Printed by `make parity` (`python -m tests.parity > docs/parity.md`), which first runs `tests/test_parity.py`. For
each class with a router in it, and each of its settings that changes the rule, it gives the class and an entry of
ours the same random weights, {T} random inputs in float32 of {D} features, {E} experts of which {K} are chosen where
k is not named, and random biases of the choice: once around 0, once all of them so low that every score is negative.
Outside ties the chosen experts are the same; the gates differ by at most the last column. Other settings are
`tests/published.py`'s. A class of an installed transformers that looks like a router and stands in none of these
lists fails the test.

What the comparison leaves out: capacities and jitter, which are not the router's here (`--model.capacity-factor`,
`switch:jitter`); a factor that is put on after the experts (Beam), which is `route_scale`; Llama 4's experts, whose
*input* the gate multiplies; experts of no cost (LongCat). LFM2 adds 1e-6 to the divisor of its gates, all others
1e-15 or less; ours is at least 1e-20. For k = 1 a gate is not divided by itself here, as it is there: it would be a
constant 1 and cut the router's gradient. Some classes normalise over the second dimension: they are right for
flattened input alone, which is what they get.

Whole blocks: `rlroute.experiments.checkpoints.blocks.read_block` takes the configuration and the weights of a block of
transformers and returns a layer of ours that gives the same output (to 1e-5 of the largest): {formats}
(`tests/test_blocks.py`).

Releases to avoid: NLLB-MoE's experts are broken from 5.0 on (two experts alone ever run; its router, below, is
sound); 5.0 to 5.4 apply a softmax twice in the pooled balance loss; 4.56 fills the mask of DeepSeek-V3's groups with
0, which sends tokens with negative scores into forbidden groups.
"""


def page() -> str:
    """Return docs/parity.md, all of it measured."""
    import transformers

    parts = [HEAD.format(version=transformers.__version__, formats=", ".join(FORMATS), T=T, D=D, E=E, K=K)]
    parts.append("| class | settings | ours | largest difference of a gate |\n|---|---|---|---|")
    for row in sorted(ROWS, key=lambda row: row.published):
        apart = max(measure(row, shift).gates for shift in SHIFTS)
        parts.append(f"| {row.published} | {row.said} | `{row.entry}` | {apart:.1e} |")
    for title, others in (("No entry of ours yet", AWAITED), ("No routers", NO_ROUTERS)):
        if others:
            parts.append(f"\n## {title}\n\n| class | what it is |\n|---|---|")
            parts += [f"| {name} | {what} |" for name, what in others.items()]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page())
