"""A decoder-only transformer: RMSNorm, rotary positions, causal attention, experts in all blocks or in some.

A routed site is a place with a router: the feed-forward layer of a block, and its attention where that has experts too.

Shape suffixes: B sequences (routing samples included), S sequence length, T = B * S tokens, D model width, V
vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute import seeding
from rlroute.config import ModelConfig, RouterConfig
from rlroute.decision import RoutingDecision
from rlroute.model.attention import Attention, AttentionExperts, Mixer, RoutedAttention
from rlroute.model.compiling import DenseParts
from rlroute.model.delta import GatedDelta, KimiDelta
from rlroute.model.head import chunked_cross_entropy
from rlroute.model.latent import LatentAttention
from rlroute.model.linear import KeyedLinear, TiedLinear
from rlroute.model.mamba import Mamba2
from rlroute.model.moe import HERE, DenseMLP, MoELayer, Placement, compute_dtype
from rlroute.model.switchhead import HeadProjection, SwitchHead
from rlroute.routing import WISHES, Router, RouterShape, RoutingContext, Site
from rlroute.sites import attention_sites, place, sites

RoutedSite = AttentionExperts | HeadProjection | MoELayer
"""A module with a router."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the data and the run add to a model's configuration.

    Attributes:
        vocab_size: V.
        seq_len: the longest sequence.
        seed: every initial weight derives from it and from the weight's name.
        backend: the expert engine, from :func:`rlroute.kernels.resolve_backend`.
        token_counts_V: how often each token occurs in the training corpus, for routers that want to know.
        placement: where the experts are; all here by default.
    """

    vocab_size: int
    seq_len: int
    seed: int
    backend: str
    token_counts_V: Tensor | None = None
    placement: Placement = HERE


class Block(DenseParts):
    """Pre-norm attention, a mixer with a state in its place or before it, then a pre-norm feed-forward layer; attention
    and that with experts where a router is given.
    """

    def __init__(self, config: ModelConfig, shape: ModelShape, layer: int, routers: Mapping[Site, Router]) -> None:
        super().__init__()
        router, own = routers.get(layer), [routers[s] for s in attention_sites(config, layer) if s in routers]
        kinds = config.mixers_at(layer)
        stateful, attends = kinds[0] != "attention", kinds[-1] == "attention"
        self.mixer_norm = nn.RMSNorm(config.d_model) if stateful else None
        self.mixer = make_mixer(kinds[0], config, shape.seq_len, layer, shape.seed) if stateful else None
        self.attention_norm = nn.RMSNorm(config.d_model) if attends else None
        self.attention = _attention(config, shape, layer, own) if attends else None
        self.ffn_norm = nn.RMSNorm(config.d_model)
        self.moe = (
            None if router is None else MoELayer(config, router, layer, shape.seed, shape.backend, shape.placement)
        )
        width = config.active_width if layer in config.moe_layers else config.d_dense or config.active_width
        self.mlp = DenseMLP(config, layer, shape.seed, width) if router is None else None

    @property
    def parts(self) -> list[Mixer | RoutedAttention | MoELayer | DenseMLP]:
        """What the block adds to the residual stream, in its order."""
        return [part for part in (self.mixer, self.attention, self.moe, self.mlp) if part is not None]

    @property
    def routed_parts(self) -> list[RoutedAttention | MoELayer]:
        """The block's modules that have routed sites, in their order."""
        return [part for part in self.parts if isinstance(part, RoutedAttention | MoELayer)]

    def forward(
        self, x_BSD: Tensor, context: RoutingContext, mask_BSS: Tensor | None = None
    ) -> tuple[Tensor, dict[Site, RoutingDecision]]:
        """Return the residual stream after the block, and the decisions of its routed sites, in their order.

        Args:
            x_BSD: the residual stream.
            context: of its rows.
            mask_BSS: bool, whom each position attends to; None: itself and all before.
        """
        mask = [] if mask_BSS is None else [mask_BSS]
        made: dict[Site, RoutingDecision] = {}
        if isinstance(self.attention, RoutedAttention) and self.attention_norm is not None:
            y_BSD, made = self.attention(self.attention_norm(x_BSD), context, mask_BSS)
            x_BSD = x_BSD + y_BSD
            x_TD = self.ffn_norm(x_BSD).flatten(0, 1)
        elif self.moe is None:
            dense_BSD: Tensor = self.forgetting(self.part, Block.dense, x_BSD, *mask)
            return dense_BSD, made
        else:
            x_BSD, x_TD = self.forgetting(self.part, Block.attend, x_BSD, *mask)
        assert self.moe is not None
        shape = self.moe.router.shape
        y_TD, made[shape.site] = self.moe(x_TD, context.at(shape, {**context.earlier, **made}))
        return x_BSD + y_TD.view_as(x_BSD), made

    def attend(self, x_BSD: Tensor, mask_BSS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the residual stream after mixers without routers, and its normed rows, shape (T, D)."""
        for norm, mixer in ((self.mixer_norm, self.mixer), (self.attention_norm, self.attention)):
            if norm is not None and mixer is not None:
                x_BSD = x_BSD + mixer(norm(x_BSD), mask_BSS)
        return x_BSD, self.ffn_norm(x_BSD).flatten(0, 1)

    def dense(self, x_BSD: Tensor, mask_BSS: Tensor | None = None) -> Tensor:
        """Return the residual stream after mixers without routers and a dense MLP."""
        assert self.mlp is not None
        x_BSD, x_TD = self.attend(x_BSD, mask_BSS)
        y_TD: Tensor = self.mlp(x_TD)
        return x_BSD + y_TD.view_as(x_BSD)


def make_mixer(kind: str, config: ModelConfig, seq_len: int, layer: int, seed: int) -> Mixer:
    """Return a mixer without routers, of a kind that :attr:`ModelConfig.mixers` names."""
    attention = LatentAttention if config.kv_rank else Attention
    kinds: dict[str, type[Attention | LatentAttention | GatedDelta | Mamba2]] = {
        "attention": attention,
        "gated_delta": GatedDelta,
        "kimi_delta": KimiDelta,
        "mamba2": Mamba2,
    }
    return kinds[kind](config, seq_len, layer, seed)


def _attention(
    config: ModelConfig, shape: ModelShape, layer: int, routers: Sequence[Router]
) -> Mixer | AttentionExperts | SwitchHead:
    """Return a block's attention: without routers, or with those of its sites."""
    size = (config, shape.seq_len, layer, shape.seed)
    if not routers:
        return make_mixer("attention", *size)
    if config.attention_form == "switchhead":
        return SwitchHead(*size, routers, shape.backend)
    (router,) = routers
    return AttentionExperts(*size, router, shape.backend)


class Transformer(DenseParts):
    """Tokens to next-token logits, with the decision of each routed site beside them.

    Args:
        config: the model.
        shape: vocabulary, sequence length, seed, engine.
        make_router: builds the router of a site; None builds the dense model of equal active width.

    Attributes:
        loss_chunk: tokens whose logits :meth:`losses` has at a time; None for all of them.
        packed: whether the last id opens a document, and attention stays within it.
    """

    loss_chunk: int | None = None
    packed = False

    def __init__(
        self, config: ModelConfig, shape: ModelShape, make_router: Callable[[RouterShape], Router] | None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab_size, config.d_model)
        seeding.init_normal(self.embed.weight, config.d_model**-0.5, shape.seed, "embed")
        routers = {} if make_router is None else {s.site: make_router(s) for s in router_shapes(config, shape)}
        tie(routers.values())
        self.layers = nn.ModuleList(Block(config, shape, layer, routers) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model)
        self.unembed = (
            TiedLinear(self.embed)
            if config.tie_embeddings
            else KeyedLinear(config.d_model, shape.vocab_size, config.d_model**-0.5, shape.seed, "unembed")
        )
        if config.init_scale != 1.0:
            _rescale(self, config.init_scale)

    @property
    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def routed(self) -> list[RoutedSite]:
        """The routed sites, first to last."""
        return [site for block in self.blocks for part in block.routed_parts for site in part.sites]

    @property
    def routers(self) -> list[Router]:
        """Their routers."""
        return [site.router for site in self.routed]

    def forward(self, tokens_BS: Tensor, context: RoutingContext) -> tuple[Tensor, list[RoutingDecision]]:
        """Return logits of shape (B, S, V) and the decision of each routed site.

        Args:
            tokens_BS: int64 token ids; with M routing samples the batch is repeated M times, sample-major.
            context: the context of the batch's B * S tokens; each site gets its own by :meth:`RoutingContext.at`.
        """
        x_BSD, decisions = self.body(tokens_BS, context)
        return self.logits(x_BSD), decisions

    def losses(
        self, tokens_BS: Tensor, targets_T: Tensor, context: RoutingContext
    ) -> tuple[Tensor, list[RoutingDecision]]:
        """Return each row's own cross-entropy in nats, shape (T,), and the decision of each routed site.

        Args:
            tokens_BS, context: as :meth:`forward` takes them.
            targets_T: int64, what follows each token.
        """
        x_BSD, decisions = self.body(tokens_BS, context)
        if self.loss_chunk is not None:
            x_TD, weight_VD = self.norm(x_BSD).flatten(0, 1), self.unembed.weight
            dtype, run = compute_dtype(x_TD), self.part
            return chunked_cross_entropy(x_TD, weight_VD, targets_T, self.loss_chunk, dtype, run), decisions
        loss_T: Tensor = self.part(Transformer.cross_entropy, x_BSD, targets_T)
        return loss_T, decisions

    def body(self, tokens_BS: Tensor, context: RoutingContext) -> tuple[Tensor, list[RoutingDecision]]:
        """Return the residual stream after the last block, and the decision of each routed site."""
        x_BSD = self.embed(tokens_BS).to(self.norm.weight.dtype)  # the residual stream is float32 at least
        mask_BSS = within_documents(tokens_BS, self.embed.num_embeddings - 1) if self.packed else None
        for block in self.layers:
            x_BSD, made = block(x_BSD, context, mask_BSS)
            context = replace(context, earlier={**context.earlier, **made})
        return x_BSD, list(context.earlier.values())

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Return the logits of a residual stream, shape (B, S, V)."""
        logits_BSV: Tensor = self.unembed(self.norm(x_BSD))
        return logits_BSV

    def cross_entropy(self, x_BSD: Tensor, targets_T: Tensor) -> Tensor:
        """Return each row's cross-entropy in nats, in float32 at least; shape (T,)."""
        logits_TV = self.logits(x_BSD).flatten(0, 1)
        wide_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
        return functional.cross_entropy(wide_TV, targets_T, reduction="none")


def _rescale(model: Transformer, scale: float) -> None:
    """Multiply the variance of initial weights, but for embeddings and what is a router's."""
    kept = {id(weights) for part in (model.embed, *model.routers) for weights in part.parameters()}
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1 and id(weights) not in kept:
                weights.mul_(scale**0.5)


def tie(routers: Iterable[Router]) -> None:
    """Let the sites of each router have in common what it says, as the first of them has it."""
    first: dict[tuple[type[Router], RouterConfig, tuple[str, ...]], Router] = {}
    for router in routers:
        owner = first.setdefault((type(router), router.config, router.common), router)
        for name in router.common:
            parent, _, child = name.rpartition(".")
            setattr(router.get_submodule(parent), child, owner.get_submodule(name))


def within_documents(tokens_BS: Tensor, opens: int) -> Tensor:
    """Return whom each position attends to where a token opens a document: itself and those before in the same one;
    bool of shape (B, S, S).

    Rotary positions are relative: within a document they are the same wherever it begins, but for rounding.
    """
    document_BS = (tokens_BS == opens).cumsum(1)
    return (document_BS[:, :, None] == document_BS[:, None, :]).tril()


def _grants(config: ModelConfig, site: Site, shards: int) -> frozenset[str]:
    """Return what a site hands to routers that wish for it: outputs and weights of the model's width, which are those
    of a pair and of all experts.
    """
    if isinstance(site, str):
        return WISHES - {"weights"}
    had = {"outputs": config.gate_at == "output", "weights": shards == 1 and not config.num_free_experts}
    return frozenset(wish for wish in WISHES if had[wish] and config.d_latent is None)


def router_shapes(config: ModelConfig, shape: ModelShape) -> list[RouterShape]:
    """Return what each routed site's router is built for, first to last."""
    experts = sites(config)
    return [
        RouterShape(
            d_model=config.d_model,
            num_experts=count,
            k=config.k,
            site=site,
            vocab_size=shape.vocab_size,
            seed=shape.seed,
            token_counts_V=shape.token_counts_V,
            site_index=index,
            num_sites=len(experts),
            # The experts of attention are replicas on every device, and none of them is shared.
            devices=(config.devices or shape.placement.shards) if isinstance(site, int) else 1,
            num_shared_experts=config.num_shared_experts if isinstance(site, int) else 0,
            weighs_shared=config.shared_gate != "none" and isinstance(site, int),
            grants=_grants(config, site, shape.placement.shards),
            d_expert=config.d_expert,
            num_free_experts=config.num_free_experts if isinstance(site, int) else 0,
            d_value=config.attention_width // config.num_heads if place(site)[1] == "value" else None,
        )
        for index, (site, count) in enumerate(experts.items())
    ]
