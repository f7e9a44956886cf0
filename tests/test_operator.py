"""The expert MLP as one operator: what PyTorch asks of one, and a compiled region around it.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows, E experts, K slots per token, R pairs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.kernels import ExpertWeights, Form, expert_mlp, operator
from rlroute.routing import RoutingDecision
from tests.conftest import draw
from tests.test_compiling import counters
from tests.test_engines import E, T, by_experts, limited, slots, tolerances

SLOW = {"cpu": [], "triton": [pytest.mark.slow]}
BACKENDS = [pytest.param(case.values[0], marks=[*case.marks, *SLOW[str(case.id)]]) for case in tolerances()]
DECISIONS = {
    "slots": lambda: slots(0.0),
    "bound": lambda: limited(slots(0.5, max_pairs=19)),
    "experts": lambda: by_experts(0.0),
}
"""In which every row runs: what the others hold is anything."""


def leaves(plain: bool, learns: bool) -> tuple[list[Tensor], Form]:
    """Return an input and weights, with the biases behind them, and what the experts do besides."""
    shapes = [(T, 6), (E, 8, 6), (E, 6, 4), *([] if plain else [(E, 8), (E, 6)])]
    drawn = [draw(*shape, seed=number).float().requires_grad_(learns) for number, shape in enumerate(shapes)]
    if plain:
        return drawn, Form()
    return drawn, Form(drawn[3], drawn[4], gate_at_input=True, dropout=0.3)


def arguments(decision: RoutingDecision, backend: str, plain: bool, learns: bool) -> tuple[Any, ...]:
    """Return what the operator is called with."""
    (x_TD, in_EHD, out_EDF, *_), form = leaves(plain, learns)
    gates_R = decision.gates_R.float().requires_grad_(learns)
    keys_R = None if plain else torch.arange(len(gates_R))
    pairs = (decision.token_ids_R, decision.expert_ids_R, decision.kept_R, decision.k, decision.max_pairs)
    how = (backend, "swiglu", form.gate_at_input, form.dropout, learns)
    return x_TD, in_EHD, out_EDF, gates_R, form.in_bias_EH, form.out_bias_ED, keys_R, *pairs, *how


@pytest.mark.filterwarnings("ignore")  # of the tools themselves
@pytest.mark.parametrize("make", DECISIONS.values(), ids=DECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("plain", "learns"), [(True, True), (False, True), (False, False)])
def test_it_is_what_pytorch_asks_of_an_operator(make: Any, backend: str, plain: bool, learns: bool) -> None:
    """Shapes without running it, of any size; gradients that are registered; nothing written or shared."""
    torch.library.opcheck(operator._expert_mlp, arguments(make(), backend, plain, learns))


def region(
    x_TD: Tensor,
    in_EHD: Tensor,
    out_EDF: Tensor,
    in_bias_EH: Tensor,
    out_bias_ED: Tensor,
    logits_TK: Tensor,
    ids_TK: Tensor,
) -> Tensor:
    """Something before the experts, and something behind."""
    decision = RoutingDecision.token_choice(ids_TK, logits_TK.softmax(1), E)
    out_TD = expert_mlp(x_TD.relu(), decision, ExpertWeights(in_EHD, out_EDF), form=Form(in_bias_EH, out_bias_ED))
    return out_TD.sin().sum()


IN_FULL = pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.processes])


@pytest.mark.parametrize("compiler", ["aot_eager", IN_FULL])
def test_a_compiled_region_holds_it_without_a_break(compiler: str) -> None:
    torch.compiler.reset()
    counters().clear()
    learning = [*leaves(False, True)[0], draw(T, 3).float().requires_grad_()]
    ids_TK = slots(0.5).expert_ids_R.view(T, 3)
    runs: list[Callable[..., Tensor]] = [region, torch.compile(region, fullgraph=True, backend=compiler)]
    found = []
    for run in runs:
        loss = run(*learning, ids_TK)
        found.append([loss.detach(), *torch.autograd.grad(loss, learning)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counters()["stats"]["unique_graphs"] == 1 and not counters()["graph_break"]
