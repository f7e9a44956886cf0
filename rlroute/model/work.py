"""What a router runs, counted while it runs: nobody declares it.

Matrix products are counted as they are, forward and backward, so that what carries no gradient is charged once and what
does as often as it ran. Elementwise work is left out, as that of norms and activations is, as long as there is no more
of it than normalising a token and drawing for its experts takes; beyond that all of it counts, one FLOP a number.

What is computed outside PyTorch cannot be counted. Whoever does that for each row needs a number of each row there:
where so many leave PyTorch, it is said by which methods. A loop's bound, or a number of each expert, is fewer.

Shape suffixes: T rows, D model width, R routed pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rlroute.balance import regularisers
from rlroute.coupling import terms_of_weights
from rlroute.faults import noted
from rlroute.learning import adapt, count, observe, weighted
from rlroute.model.checks import check, named
from rlroute.model.wishes import stand_in
from rlroute.routing import Feedback, Router, RoutingContext, RoutingDecision, Site

ROWS = 256
"""So many rows are routed where nobody hands in a batch."""
SMALL = (4, 8)
"""A greedy forward's elementwise numbers per token that are left out: so many times D and so many times E."""
SMALL_STEP = 10
"""In a step so many times that: it draws, and has terms and a backward."""
OWN = ("aten", "prim", "prims", "c10d", "_c10d_functional")
"""Whose operators are known: PyTorch's."""
_MOVES = (
    *("alias", "as_strided", "cat", "clone", "copy_", "_to_copy", "constant_pad_nd", "embedding", "expand", "fill_"),
    *("flip", "gather", "index", "index_fill", "index_put_", "index_put", "index_select", "masked_fill"),
    *("masked_fill_", "masked_select", "new_empty", "repeat", "repeat_interleave", "roll", "scatter"),
    *("select_backward", "slice_backward", "stack", "tril", "triu", "unfold_backward", "where", "zero_"),
)
"""What only moves numbers, by the names of ATen."""
EXITS = ("numpy", "__array__", "__dlpack__", "tolist", "data_ptr", "item", "__float__", "__int__", "__index__")
"""Methods by which a tensor's numbers leave PyTorch."""
_FACTORISATIONS = ("linalg_", "_linalg_", "cholesky", "triangular_solve", "lu_", "geqrf", "ormqr")
"""How the names begin of what takes about n multiplications for each number of an n x n matrix."""


def _vector_products(func: Any, args: tuple[Any, ...]) -> int | None:
    """Return the FLOPs of products that PyTorch's own table leaves out; None for everything else."""
    name, tensors = func._overloadpacket.__name__, [a for a in args if isinstance(a, Tensor)]
    if name in ("mv", "dot", "vdot"):
        return 2 * tensors[0].numel()
    if name == "addmv":
        return 2 * tensors[1].numel()
    if name == "addr":
        return 2 * tensors[0].numel()
    if name in ("_cdist_forward", "_euclidean_dist", "_cdist_backward"):
        return 3 * prod(tensors[0].shape[:-1]) * tensors[1].shape[-2] * tensors[0].shape[-1]
    if name.startswith(_FACTORISATIONS) and name not in ("linalg_vector_norm", "linalg_cross") and tensors[0].dim() > 1:
        return tensors[0].numel() * tensors[0].shape[-1]
    return None


class Exits(TorchFunctionMode):
    """Counts the numbers that leave PyTorch inside it, on this thread; a truth value only says which way to go.

    Attributes:
        numbers: how many.
        methods: by which methods.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.methods: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run what is called on a tensor, and count what leaves by it."""
        name = getattr(func, "__name__", "")
        if name in EXITS and args[0].dtype != torch.bool:
            self.numbers += args[0].numel()
            self.methods.add(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is computed inside it, on this thread: FLOPs of matrix products, and numbers of elementwise work.

    Attributes:
        products: FLOPs of matrix products and factorisations.
        elements: floating-point numbers that anything else made or read.
        read: the storages that were read by more than a view.
        foreign: operators that are not PyTorch's own, of which nothing can be known.
        exits: what leaves PyTorch.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = self.elements = 0
        self.read: set[int] = set()
        self.foreign: set[str] = set()
        self.exits = Exits()

    def __enter__(self) -> Self:
        self.exits.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.exits.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it; one that is made of others is counted by these."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if not func.is_view and packet.__name__ != "detach":
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        inputs, packet = _tensors([*args, *kwargs.values()]), func._overloadpacket
        self.read |= {tensor.untyped_storage().data_ptr() for tensor in inputs}
        if func.namespace not in OWN:
            self.foreign.add(str(packet))
        elif packet in flop_registry:
            self.products += flop_registry[packet](*args, **kwargs, out_val=out)
        elif (products := _vector_products(func, args)) is not None:
            self.products += products
        elif packet.__name__ not in _MOVES:
            made = _tensors([out])
            looked = made if torch.Tag.pointwise in func.tags else [*made, *inputs]
            self.elements += max((t.numel() for t in looked if t.is_floating_point()), default=0)

    def per_row(self, rows: int) -> tuple[float, float]:
        """Return FLOPs of products, and elementwise numbers, of each of so many rows."""
        return self.products / rows, self.elements / rows

    def uncounted(self, rows: int) -> set[str]:
        """Return what was done that nobody can count: foreign operators, and by what so many numbers left PyTorch."""
        return self.foreign | (self.exits.methods if self.exits.numbers >= rows else set())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here: the wrapper that keeps it so takes seconds to import."""
        return False


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    flat = chain.from_iterable(v if isinstance(v, list | tuple) else [v] for v in values)
    return [value for value in flat if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Work:
    """What a router runs, in FLOPs per row.

    Attributes:
        greedy: the greedy forward.
        forward: in training, all but the backward and ``adapt``: the forward, the terms, what is observed.
        training: that and the backward.
        adapt: FLOPs per step, whatever the number of rows: ``adapt``, and terms of the router's weights.
        active_parameters: numbers in the matrices, trained or not, that the greedy forward reads.
        buffers: those of them that are no parameters.
        elementwise: whether elementwise work is counted in: there is more than is left out.
        foreign: operators that are not PyTorch's and could not be counted, and by what a number a row left PyTorch.
    """

    greedy: int
    forward: int
    training: int
    adapt: int
    active_parameters: int
    buffers: int
    elementwise: bool = False
    foreign: tuple[str, ...] = ()


def measure(router: Router, x_TD: Tensor | None = None, contexts: Mapping[bool, RoutingContext] | None = None) -> Work:
    """Count what a router runs, on a copy of it: nothing that it holds is changed, nor any generator of PyTorch's.

    Args:
        router: any; of one on the meta device another is built from its configuration and shape.
        x_TD: hidden states of all routing samples; where there are none, fixed draws for ``ROWS`` tokens.
        contexts: those of the greedy forward (False), of the first sample's rows, and of training (True).
    """
    router = _copy(router)
    if x_TD is None or contexts is None:
        router = router.cpu()  # what is booked is the same on all devices
        x_TD, contexts = _some_rows(router, router.num_samples)
    return _measure(router, x_TD, contexts)[0]


def measure_sites(routers: Sequence[Router]) -> tuple[Work, ...]:
    """Count what the routers of a model's sites run, first to last, as :func:`measure` does on fixed draws: each meets
    the decisions of those before it, which some go by.
    """
    samples = max((router.num_samples for router in routers), default=1)
    earlier: dict[bool, dict[Site, RoutingDecision]] = {False: {}, True: {}}
    works, counted = [], set[int]()
    for router in routers:
        router_copy = _copy(router).cpu()
        x_TD, contexts = _some_rows(router_copy, samples)
        contexts = {mode: replace(context, earlier=dict(earlier[mode])) for mode, context in contexts.items()}
        work, made, read = _measure(router_copy, x_TD, contexts)
        for mode, decision in made.items():
            earlier[mode][router.shape.site] = decision
        mine = [router.get_parameter(name) for name in read]
        again = sum(p.numel() for p in mine if id(p) in counted)  # what sites have in common is there once
        works.append(replace(work, active_parameters=work.active_parameters - again))
        counted |= set(map(id, mine))
    return tuple(works)


def _measure(
    router: Router, x_TD: Tensor, contexts: Mapping[bool, RoutingContext]
) -> tuple[Work, dict[bool, RoutingDecision], list[str]]:
    """Count what a copy of a router runs; return that, what it decided in each mode, detached, and the names of the
    matrices among its parameters that its greedy forward read.
    """
    greedy, first_TD = Counter(), x_TD[: len(contexts[False].token_ids_T)].detach()
    with torch.random.fork_rng(devices=[x_TD.device] if x_TD.is_cuda else []):
        with torch.no_grad():
            plain = _decide(router, first_TD, contexts[False], greedy)
        read, buffers = _matrices_read(router, greedy)
        step, trained = _step(router, x_TD, contexts[True])
    forward, back, last = step
    per_row = [greedy.per_row(len(first_TD)), forward.per_row(len(x_TD)), back.per_row(len(x_TD))]
    small = SMALL[0] * router.shape.d_model + SMALL[1] * router.shape.num_experts
    (_, alone), (_, stepping), (_, backing) = per_row
    elementwise = alone > small or stepping + backing > SMALL_STEP * small
    flops = [round(products + elementwise * elements) for products, elements in per_row]
    work = Work(
        greedy=flops[0],
        forward=flops[1],
        training=flops[1] + flops[2],
        adapt=last.products,
        active_parameters=sum(router.get_parameter(name).numel() for name in read) + buffers,
        buffers=buffers,
        elementwise=elementwise,
        foreign=tuple(sorted(greedy.uncounted(len(first_TD)).union(*(c.uncounted(len(x_TD)) for c in step)))),
    )
    return work, {False: plain, True: trained.detach()}, read


def _copy(router: Router) -> Router:
    if any(tensor.is_meta for tensor in [*router.parameters(), *router.buffers()]):
        with torch.device("cpu"):
            copy = type(router)(router.config, router.shape)
        if router.frozen:
            copy.freeze()
        return copy
    router = deepcopy(router)
    router.zero_grad()
    return router


def _decide(router: Router, x_TD: Tensor, context: RoutingContext, counter: Counter) -> RoutingDecision:
    """Return a router's decision, looked at, and count what it took."""
    with named(router, context.site), noted(router.config.name, context.site):
        with counter:
            decision: RoutingDecision = router(x_TD, context)
        check(router, x_TD, decision)
    return decision


def _matrices_read(router: Router, counter: Counter) -> tuple[list[str], int]:
    """Return the names of the matrices among the parameters that were read, and the numbers in those among the
    buffers.
    """

    def is_read(tensor: Tensor) -> bool:
        return tensor.dim() > 1 and tensor.untyped_storage().data_ptr() in counter.read

    buffers = sum(b.numel() for b in router.buffers() if b.is_floating_point() and is_read(b))
    return [name for name, p in router.named_parameters() if is_read(p)], buffers


def _step(
    router: Router, x_TD: Tensor, context: RoutingContext
) -> tuple[tuple[Counter, Counter, Counter], RoutingDecision]:
    """Run what a step runs at one site, and return what it took: all before and beside the backward, that, and what is
    run once a step; and the decision.
    """
    whose, forward, back, last = (router.config.name, context.site), Counter(), Counter(), Counter()
    x_TD = x_TD.detach().clone().requires_grad_()
    context = replace(context, earlier={site: _leaves(made) for site, made in context.earlier.items()})
    loss_MT = torch.linspace(1, 2, len(x_TD), dtype=x_TD.dtype, device=x_TD.device).view(context.num_samples, -1)
    feedback = Feedback(context=context, loss_MT=loss_MT, num_valid=loss_MT.shape[1])
    with torch.enable_grad():
        decision = _decide(router, x_TD * 1, context, forward)  # of no leaf, as in a model
        decision = stand_in(router, decision, x_TD)
        with noted(*whose), forward:
            terms = regularisers(router, decision, feedback) | router.objective(decision, feedback)
        weights = (decision.gates_R, decision.self_T, decision.shared_gates_TS, decision.fill_TD)
        loss = weighted([terms]) + sum(part.sum() for part in weights if part is not None and part.requires_grad)
        if decision.gates_R.requires_grad:
            decision.gates_R.retain_grad()
        if isinstance(loss, Tensor) and loss.requires_grad:
            with back:
                torch.autograd.backward(loss)
    with noted(*whose), last, torch.enable_grad():
        loss = weighted([terms_of_weights(router, decision, feedback)])
        if isinstance(loss, Tensor) and loss.requires_grad:
            torch.autograd.backward(loss)
    with noted(*whose), forward:
        sums = count(decision, feedback) | observe(router, decision, feedback)
    with noted(*whose), last:
        adapt([router], [sums], context.progress)
    return (forward, back, last), decision


def _leaves(decision: RoutingDecision) -> RoutingDecision:
    """Return a decision of a site before, to whose scores and memo the backward goes on, as in a model."""

    def leaf(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_() if floats else value

    memo = {name: leaf(value) for name, value in decision.memo.items()}
    return replace(decision, logits_TE=leaf(decision.logits_TE), probs_TE=leaf(decision.probs_TE), memo=memo)


def _some_rows(router: Router, samples: int) -> tuple[Tensor, dict[bool, RoutingContext]]:
    """Return fixed draws for a router that meets no other: hidden states, and the contexts of both modes."""
    held = [*router.parameters(), *router.buffers()]
    device = held[0].device if held else torch.device("cpu")
    dtype = next((t.dtype for t in held if t.is_floating_point()), torch.float32)
    row_T, length = torch.arange(ROWS, device=device), ROWS // 4
    generator = torch.Generator().manual_seed(0)
    context = RoutingContext(
        seed=0,
        site=router.shape.site,
        step=0,
        token_ids_T=row_T % router.shape.vocab_size,
        position_T=row_T % length,
        sequence_T=row_T // length,
        mask_T=torch.ones_like(row_T, dtype=torch.bool),
        explore=False,
    ).at(router.shape, {})
    rows = ("token_ids_T", "position_T", "sequence_T", "mask_T")
    repeated = {name: getattr(context, name).repeat(samples) for name in rows}
    x_TD = torch.randn(ROWS, router.shape.d_model, generator=generator).repeat(samples, 1).to(device, dtype)
    return x_TD, {False: context, True: replace(context, explore=True, num_samples=samples, **repeated)}
