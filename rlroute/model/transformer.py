"""A decoder-only transformer: RMSNorm, rotary positions, causal attention, MoE in every layer but the first n.

Shape suffixes: B sequences (routing samples included), S sequence length, T = B * S tokens, D model width, N heads, H head width,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute import seeding
from rlroute.config import ModelConfig
from rlroute.model.moe import HERE, DenseMLP, MoELayer, Placement
from rlroute.routing import Router, RouterShape, RoutingContext, RoutingDecision


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


class _Linear(nn.Linear):
    """A linear map without bias, initialised from its key."""

    def __init__(self, d_in: int, d_out: int, std: float, seed: int, name: str) -> None:
        super().__init__(d_in, d_out, bias=False)
        seeding.init_normal(self.weight, std, seed, name)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021, arXiv 2104.09864)."""

    cos_SH: Tensor
    sin_SH: Tensor

    def __init__(self, config: ModelConfig, shape: ModelShape, layer: int) -> None:
        super().__init__()
        width, self.num_heads = config.d_model, config.num_heads
        std = width**-0.5
        self.qkv = _Linear(width, 3 * width, std, shape.seed, f"layers.{layer}.attention.qkv")
        self.out = _Linear(
            width, width, std / (2 * config.num_layers) ** 0.5, shape.seed, f"layers.{layer}.attention.out"
        )
        half = width // self.num_heads // 2
        angles = torch.arange(shape.seq_len)[:, None] * config.rope_base ** (-torch.arange(half) / half)
        self.register_buffer("cos_SH", angles.cos(), persistent=False)
        self.register_buffer("sin_SH", angles.sin(), persistent=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the attention output, shape (B, S, D)."""
        batch, length, width = x_BSD.shape
        qk_BNSH, v_BNSH = (
            self.qkv(x_BSD)
            .view(batch, length, 3 * self.num_heads, -1)
            .transpose(1, 2)
            .split((2 * self.num_heads, self.num_heads), dim=1)
        )
        q_BNSH, k_BNSH = self._rotate(qk_BNSH).chunk(2, dim=1)
        y_BNSH = functional.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)
        y_BSD: Tensor = self.out(y_BNSH.transpose(1, 2).reshape(batch, length, width))
        return y_BSD

    def _rotate(self, x_BNSH: Tensor) -> Tensor:
        length = x_BNSH.shape[2]
        cos_SH, sin_SH = self.cos_SH[:length].to(x_BNSH.dtype), self.sin_SH[:length].to(x_BNSH.dtype)
        a, b = x_BNSH.chunk(2, dim=-1)
        return torch.cat((a * cos_SH - b * sin_SH, a * sin_SH + b * cos_SH), dim=-1)


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward layer, MoE where a router is given."""

    def __init__(self, config: ModelConfig, shape: ModelShape, layer: int, router: Router | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = Attention(config, shape, layer)
        self.ffn_norm = nn.RMSNorm(config.d_model)
        self.moe = (
            None if router is None else MoELayer(config, router, layer, shape.seed, shape.backend, shape.placement)
        )
        self.mlp = DenseMLP(config, layer, shape.seed, config.active_width) if router is None else None

    def forward(self, x_BSD: Tensor, context: RoutingContext) -> tuple[Tensor, RoutingDecision | None]:
        """Return the residual stream after the block, and the MoE layer's decision."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        x_TD = self.ffn_norm(x_BSD).flatten(0, 1)
        if self.moe is None:
            assert self.mlp is not None
            return x_BSD + self.mlp(x_TD).view_as(x_BSD), None
        y_TD, decision = self.moe(x_TD, context)
        return x_BSD + y_TD.view_as(x_BSD), decision


class Transformer(nn.Module):
    """Tokens to next-token logits, with the decision of each MoE layer beside them.

    Args:
        config: the model.
        shape: vocabulary, sequence length, seed, engine.
        make_router: builds the router of a layer; None builds the dense model of equal active width.
    """

    def __init__(
        self, config: ModelConfig, shape: ModelShape, make_router: Callable[[RouterShape], Router] | None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab_size, config.d_model)
        seeding.init_normal(self.embed.weight, config.d_model**-0.5, shape.seed, "embed")
        self.layers = nn.ModuleList(
            Block(config, shape, layer, self._router(config, shape, layer, make_router))
            for layer in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.d_model)
        self.unembed = _Linear(config.d_model, shape.vocab_size, config.d_model**-0.5, shape.seed, "unembed")

    @staticmethod
    def _router(
        config: ModelConfig, shape: ModelShape, layer: int, make_router: Callable[[RouterShape], Router] | None
    ) -> Router | None:
        if make_router is None or layer < config.num_dense_layers:
            return None
        return make_router(
            RouterShape(
                d_model=config.d_model,
                num_experts=config.num_experts,
                k=config.k,
                layer=layer,
                vocab_size=shape.vocab_size,
                seed=shape.seed,
                token_counts_V=shape.token_counts_V,
                moe_index=layer - config.num_dense_layers,
                moe_layers=config.num_layers - config.num_dense_layers,
            )
        )

    @property
    def routers(self) -> list[Router]:
        """The routers of the MoE layers, first to last."""
        return [block.moe.router for block in self.layers if isinstance(block, Block) and block.moe is not None]

    def forward(self, tokens_BS: Tensor, context: RoutingContext) -> tuple[Tensor, list[RoutingDecision]]:
        """Return logits of shape (B, S, V) and the decision of each MoE layer.

        Args:
            tokens_BS: int64 token ids; with M routing samples the batch is repeated M times, sample-major.
            context: the context of the batch's B * S tokens; each layer gets it under its own index.
        """
        x_BSD = self.embed(tokens_BS)
        decisions = []
        for index, block in enumerate(self.layers):
            x_BSD, decision = block(x_BSD, replace(context, layer=index))
            if decision is not None:
                decisions.append(decision)
        return self.unembed(self.norm(x_BSD)), decisions
