"""What a model costs and whether two of them started alike: parameters, FLOPs, fingerprints.

Shape suffixes: S sequence length, L routed sites, M routing samples.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import ModelConfig
from rlroute.model.attention import Attention
from rlroute.model.transformer import Transformer, sites
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
    attention = tuple(f"layers.{site}." for site in sites(config) if isinstance(site, str))
    experts = (".experts.", ".moe.")
    backbone = [(n, p) for n, p in shared if not any(e in n for e in experts) and not n.startswith(attention)]
    return {"shared": fingerprint(shared), "backbone": fingerprint(backbone)}


@dataclass(frozen=True)
class Costs:
    """Parameters, and forward FLOPs by what they are spent on: what every token runs, and what each pair adds at its
    site.

    Attention counts (S + 1) / 2 keys per token; norms and activations are left out; the embedding is a look-up. A step
    is charged three forwards of all that is differentiated; of the routers, what they were seen to run.

    Attributes:
        total_parameters, router_parameters: all of them, and those of routers; matrices that a greedy forward reads are
            among them where they are not trained by gradients, too (a bandit's).
        fixed_parameters, fixed_flops: what a token's greedy forward uses whatever its route: the backbone and the
            routers' scores.
        pair_parameters_L, pair_flops_L: what each pair adds, by site.
        work_L: what each router runs, by site.
        samples: M.
    """

    total_parameters: int
    router_parameters: int
    fixed_parameters: int
    fixed_flops: int
    pair_parameters_L: tuple[int, ...]
    pair_flops_L: tuple[int, ...]
    work_L: tuple[Work, ...]
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

    def recorded(self, pairs_L: Sequence[float], spent: int, tokens: int, steps: int) -> dict[str, int]:
        """Return what a run records: parameters, FLOPs per token of the greedy forward, what training took beyond
        that, and what it took in all.

        Args:
            pairs_L: pairs per token of the greedy forward, by site.
            spent: training FLOPs, of so many ``steps`` on so many ``tokens``.
        """
        greedy = self.per_token(pairs_L)
        forward = greedy["flops_per_token"]
        trained = self.forward_in_training(spent, tokens, steps) if tokens else forward
        return greedy | {
            "total_parameters": self.total_parameters,
            "router_parameters": self.router_parameters,
            "training_only_flops_per_token": trained - forward,
            "training_flops": spent,
        }

    def of_training(self, tokens: int, pairs_L: Sequence[int], steps: int = 1) -> int:
        """Return the FLOPs of steps on so many tokens with so many pairs at each site, of all routing samples."""
        pairs = sum(n * each for n, each in zip(pairs_L, self.pair_flops_L, strict=True))
        return 3 * pairs + self._beside_pairs(tokens, steps)

    def forward_in_training(self, spent: int, tokens: int, steps: int) -> int:
        """Return the FLOPs per token of so many steps on so many tokens that took ``spent`` in all, but for those of
        backwards.
        """
        pairs = (spent - self._beside_pairs(tokens, steps)) / 3
        adapting = steps * sum(work.adapt for work in self.work_L)
        return self.samples * (self.fixed_flops + self.training_flops) + round((pairs + adapting) / tokens)

    def _beside_pairs(self, tokens: int, steps: int) -> int:
        """Return the FLOPs of steps but for those of pairs: three forwards of the backbone, and the routers."""
        backbone = self.fixed_flops - sum(work.greedy for work in self.work_L)
        routers = sum(work.training for work in self.work_L)
        return tokens * self.samples * (3 * backbone + routers) + steps * sum(work.adapt for work in self.work_L)


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
    plain_attention = sum(isinstance(block.attention, Attention) for block in model.blocks)
    return Costs(
        total_parameters=total + buffers,
        router_parameters=router + buffers,
        fixed_parameters=fixed + sum(work.active_parameters for work in work_L),
        fixed_flops=2 * (fixed - model.embed.weight.numel() - norms)
        + 2 * plain_attention * (seq_len + 1) * config.attention_width
        + sum(work.greedy for work in work_L),
        pair_parameters_L=tuple(site.pair_parameters for site in routed),
        pair_flops_L=tuple(site.pair_flops(seq_len) for site in routed),
        work_L=work_L,
        samples=max((site.router.num_samples for site in routed), default=1),
    )
