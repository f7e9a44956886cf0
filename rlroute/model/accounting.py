"""What a model costs and whether two of them started alike: parameters, FLOPs, fingerprints.

Shape suffixes: S sequence length, L routed sites, M routing samples.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlroute.config import ModelConfig
from rlroute.model.attention import Mixer, RoutedAttention
from rlroute.model.linear import TiedLinear
from rlroute.model.moe import MoELayer
from rlroute.model.transformer import Transformer
from rlroute.model.work import Work, measure_sites


def is_router(name: str) -> bool:
    """Whether a parameter of this name belongs to a router."""
    return ".router." in name


def is_expert(name: str) -> bool:
    """Whether a parameter of this name holds experts of an MoE layer, one a row: what expert parallelism cuts."""
    return ".moe.experts." in name


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter that is no router's holds matrices: what decays, and may be in bfloat16.

    Of experts, real or free, it has one row each: their biases and constants are vectors.
    """
    return parameter.dim() > (2 if is_expert(name) or ".moe.free." in name else 1)


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over the names and bytes of parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprints(
    model: Transformer, config: ModelConfig, whole: Callable[[Tensor], Tensor] = lambda tensor_E: tensor_E
) -> dict[str, str]:
    """Return the fingerprints of the shared parameters (all but the routers') and of the backbone: those that the dense
    model of the same configuration shares too, outside the feed-forward layers and attention that has experts.

    Args:
        model: any.
        config: its configuration.
        whole: collects all experts' rows of a parameter that holds some of them.
    """
    named = [(name, p) for name, p in model.named_parameters() if not is_router(name)]
    shared = [(name, whole(p.detach()) if is_expert(name) else p) for name, p in named]
    attention = tuple(f"layers.{layer}.attention." for layer in config.moe_layers if config.attention_experts)
    experts = (".experts.", ".moe.")
    backbone = [(n, p) for n, p in shared if not any(e in n for e in experts) and not n.startswith(attention)]
    return {"shared": fingerprint(shared), "backbone": fingerprint(backbone)}


@dataclass(frozen=True)
class Step:
    """What a training step is charged, backwards included, in FLOPs.

    Attributes:
        fixed_flops: per row, whatever its route: the backbone and the routers.
        pair_flops_L: of a pair, by site.
    """

    fixed_flops: int
    pair_flops_L: tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """Parameters, and forward FLOPs by what they are spent on: what every token runs, and what each pair adds at its
    site.

    Attention counts (S + 1) / 2 keys per token, a mixer with a state what its chunks multiply; norms and activations
    are left out; the embedding is a look-up, also where its matrix is that of the logits too. A step is charged three
    forwards of what trains, two of what is frozen where a gradient passes on its way to what trains before it (of
    attention's scores, which have no weights, three), and one of the rest; of the routers, what they were seen to run.

    Attributes:
        total_parameters, router_parameters: all of them, and those of routers; matrices that a greedy forward reads are
            among them where they are not trained by gradients, too (a bandit's).
        trained_parameters: those that are not frozen.
        fixed_parameters, fixed_flops: what a token's greedy forward uses whatever its route: the backbone and the
            routers' scores.
        pair_parameters_L, pair_flops_L: what each pair adds, by site.
        work_L: what each router runs, by site.
        step: what a training step is charged.
        samples: M.
    """

    total_parameters: int
    trained_parameters: int
    router_parameters: int
    fixed_parameters: int
    fixed_flops: int
    pair_parameters_L: tuple[int, ...]
    pair_flops_L: tuple[int, ...]
    work_L: tuple[Work, ...]
    step: Step
    samples: int

    @property
    def training_flops(self) -> int:
        """Forward FLOPs per token and routing sample of what only training needs of the routers (value heads)."""
        return sum(work.forward - work.greedy for work in self.work_L)

    def per_token(self, pairs_L: Sequence[float]) -> dict[str, int]:
        """Return active parameters and FLOPs per token of a greedy forward that runs so many pairs per token at each
        site.
        """
        parameters = sum(n * each for n, each in zip(pairs_L, self.pair_parameters_L, strict=True))
        flops = sum(n * each for n, each in zip(pairs_L, self.pair_flops_L, strict=True))
        return {
            "active_parameters": self.fixed_parameters + round(parameters),
            "flops_per_token": self.fixed_flops + round(flops),
        }

    def recorded(self, pairs_L: Sequence[float], spent: int, forward: float, tokens: int) -> dict[str, int]:
        """Return what a run records: parameters, FLOPs per token of the greedy forward, what training took beyond
        that, and what it took in all.

        Args:
            pairs_L: pairs per token of the greedy forward, by site.
            spent, forward: FLOPs of training on so many ``tokens``: in all, and but for those of backwards.
        """
        greedy = self.per_token(pairs_L)
        each = greedy["flops_per_token"]
        return greedy | {
            "total_parameters": self.total_parameters,
            "router_parameters": self.router_parameters,
            "training_only_flops_per_token": round(forward / tokens) - each if tokens else 0,
            "training_flops": spent,
        }

    def of_training(self, tokens: int, pairs_L: Sequence[int], steps: int = 1) -> int:
        """Return the FLOPs of steps on so many tokens with so many pairs at each site, of all routing samples."""
        pairs = sum(n * each for n, each in zip(pairs_L, self.step.pair_flops_L, strict=True))
        return pairs + tokens * self.samples * self.step.fixed_flops + steps * self._adapting

    def forward_in_training(self, tokens: int, pairs_L: Sequence[int], steps: int = 1) -> int:
        """Return those of them that are not a backward's."""
        pairs = sum(n * each for n, each in zip(pairs_L, self.pair_flops_L, strict=True))
        return pairs + tokens * self.samples * (self.fixed_flops + self.training_flops) + steps * self._adapting

    @property
    def _adapting(self) -> int:
        return sum(work.adapt for work in self.work_L)


def costs(model: Transformer, config: ModelConfig, seq_len: int) -> Costs:
    """Count a model's parameters and FLOPs, whatever part of the experts is held here; copies of its routers run for
    it.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if is_expert(name):
            sizes[name] = p.numel() // len(p) * config.num_experts
    routed = model.routed
    total, router = sum(sizes.values()), sum(size for name, size in sizes.items() if is_router(name))
    work_L = measure_sites([site.router for site in routed])
    buffers = sum(work.buffers for work in work_L)
    fixed = total - router - sum(site.pair_parameters * site.router.shape.num_real_experts for site in routed)
    norms = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 1 and not is_router(name))
    return Costs(
        total_parameters=total + buffers,
        trained_parameters=sum(sizes[name] for name, p in model.named_parameters() if p.requires_grad),
        router_parameters=router + buffers,
        fixed_parameters=fixed + sum(work.active_parameters for work in work_L),
        fixed_flops=2 * (fixed - norms - (0 if config.tie_embeddings else model.embed.weight.numel()))
        + sum(_mixing_flops(part, seq_len) for block in model.blocks for part in block.parts)
        + sum(work.greedy for work in work_L),
        pair_parameters_L=tuple(site.pair_parameters for site in routed),
        pair_flops_L=tuple(site.pair_flops(seq_len) for site in routed),
        work_L=work_L,
        step=_step(model, work_L, seq_len),
        samples=max((site.router.num_samples for site in routed), default=1),
    )


def _step(model: Transformer, work_L: Sequence[Work], seq_len: int) -> Step:
    """Charge each part of a model, in the order of its forward, by whether it trains, and whether anything before it
    does: then a gradient passes through it.
    """
    fixed, pairs_L, works = 0, list[int](), iter(work_L)
    passes = model.embed.weight.requires_grad
    for part in (*(part for block in model.blocks for part in block.parts), model.unembed):
        mixing = _mixing_flops(part, seq_len)
        routed = part.sites if isinstance(part, RoutedAttention | MoELayer) else ()
        for site in routed:
            work, learns = next(works), not site.router.frozen
            fixed += work.training if passes or learns else work.forward
            passes |= learns and "gate" in site.router.learns_from  # by what the experts give, which it weighs
        pair_weights = [p for site in routed for p in site.pair_weights]
        apart = {id(p) for p in (*pair_weights, *(p for site in routed for p in site.router.parameters()))}
        parameters = [part.weight] if isinstance(part, TiedLinear) else part.parameters()
        own = [p for p in parameters if id(p) not in apart and p.dim() > 1]
        trains = any(p.requires_grad for p in (*own, *pair_weights))
        passes |= trains
        for site in routed:
            weights = 2 * sum(p[0].numel() for p in site.pair_weights if p.dim() > 2)
            pairs_L.append(_charged(weights, site.pair_flops(seq_len) - weights, trains, passes))
        fixed += _charged(2 * sum(p.numel() for p in own), mixing, trains, passes)
    return Step(fixed, tuple(pairs_L))


def _mixing_flops(part: nn.Module, seq_len: int) -> int:
    return part.mixing_flops(seq_len) if isinstance(part, Mixer | RoutedAttention) else 0


def _charged(weights: int, mixing: int, trains: bool, passes: bool) -> int:
    """Return a part's FLOPs of a step by those of its forward: of products with its weights, and of tokens with one
    another.
    """
    return weights * (1 + passes + trains) + mixing * (1 + 2 * passes)
