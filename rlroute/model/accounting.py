"""What a model costs and whether two of them started alike: parameters, FLOPs, fingerprints."""

import hashlib
from collections.abc import Callable, Iterable

from torch import Tensor

from rlroute.config import ModelConfig
from rlroute.model.transformer import Transformer


def is_router(name: str) -> bool:
    """Whether a parameter of this name belongs to a router."""
    return ".router." in name


def is_expert(name: str) -> bool:
    """Whether a parameter of this name holds experts of an MoE layer, one a row: what expert parallelism cuts."""
    return ".moe.experts." in name


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over the names and bytes of parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprints(model: Transformer, whole: Callable[[Tensor], Tensor] = lambda tensor_E: tensor_E) -> dict[str, str]:
    """Return the fingerprints of the shared parameters (all but the routers') and of the backbone (those outside the feed-forward
    layers, which the dense model shares too).

    Args:
        model: any.
        whole: collects all experts' rows of a parameter that holds some of them.
    """
    named = [(name, p) for name, p in model.named_parameters() if not is_router(name)]
    shared = [(name, whole(p.detach()) if is_expert(name) else p) for name, p in named]
    backbone = [(name, p) for name, p in shared if ".experts." not in name]
    return {"shared": fingerprint(shared), "backbone": fingerprint(backbone)}


def costs(model: Transformer, config: ModelConfig, seq_len: int) -> dict[str, int]:
    """Count parameters and forward FLOPs per token.

    Active is what one token's greedy forward uses: all of the backbone, k of E experts, and the router's scores. What only training
    needs (value heads, further routing samples) stands apart. Attention counts (S + 1) / 2 keys per token; norms and activations are
    left out; the embedding is a look-up.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if is_expert(name):
            sizes[name] = p.numel() // len(p) * config.num_experts  # whatever part of them is held here
    router = sum(size for name, size in sizes.items() if is_router(name))
    routed = sum(size for name, size in sizes.items() if is_expert(name))
    other = sum(sizes.values()) - router - routed
    routed_active = routed * config.k // config.num_experts
    router_flops = sum(r.flops_per_token() for r in model.routers)
    norms = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 1 and not is_router(name))
    attention = 2 * config.num_layers * (seq_len + 1) * config.d_model
    flops = 2 * (other - model.embed.weight.numel() - norms + routed_active) + attention + router_flops
    samples = max((r.num_samples for r in model.routers), default=1)
    extra = sum(r.training_flops_per_token() for r in model.routers)
    return {
        "active_parameters": other + routed_active + router_flops // 2,
        "total_parameters": sum(sizes.values()),
        "router_parameters": router,
        "flops_per_token": flops,
        "training_only_flops_per_token": samples * extra + (samples - 1) * flops,
    }
