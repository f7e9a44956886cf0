"""Causal self-attention with rotary positions: plain, or with experts for its query and output projections.

Shape suffixes: B sequences (routing samples included), S sequence length, T = B * S tokens, D model width, N heads, H
head width, I channels of all heads, E experts, R routed pairs, P width of one expert's queries, Q places of (token,
slot) pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute import seeding
from rlroute.config import ModelConfig
from rlroute.decision import RoutingDecision
from rlroute.kernels import gather_linear, linear_combine, make_plan
from rlroute.model import wishes
from rlroute.model.linear import KeyedLinear
from rlroute.model.moe import add_beside_pairs, compute_dtype, decide
from rlroute.model.recompute import Recomputing
from rlroute.routing import Router, RoutingContext, Site

if TYPE_CHECKING:
    from rlroute.model.switchhead import HeadProjection


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): the halves of a head's channels are the coordinates that
    turn.
    """

    cos_SH: Tensor
    sin_SH: Tensor

    def __init__(self, head_width: int, seq_len: int, base: float) -> None:
        super().__init__()
        half = head_width // 2
        angles = torch.arange(seq_len)[:, None] * base ** (-torch.arange(half) / half)
        self.register_buffer("cos_SH", angles.cos(), persistent=False)
        self.register_buffer("sin_SH", angles.sin(), persistent=False)

    def forward(self, x_BNSH: Tensor) -> Tensor:
        """Return queries or keys, turned by their positions."""
        length = x_BNSH.shape[2]
        cos_SH, sin_SH = self.cos_SH[:length].to(x_BNSH.dtype), self.sin_SH[:length].to(x_BNSH.dtype)
        a, b = x_BNSH.chunk(2, dim=-1)
        return torch.cat((a * cos_SH - b * sin_SH, a * sin_SH + b * cos_SH), dim=-1)


def by_head(x_BSI: Tensor, heads: int) -> Tensor:
    """Return channels by head, shape (B, N, S, I / N)."""
    return x_BSI.view(*x_BSI.shape[:2], heads, -1).transpose(1, 2)


def attend(q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, mask_BSS: Tensor | None) -> Tensor:
    """Return causal attention; where there is a mask, it is causal itself."""
    if mask_BSS is None:
        return functional.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)
    return functional.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, attn_mask=mask_BSS[:, None])


class Mixer(nn.Module, ABC):
    """What mixes the tokens of a sequence in a block, and has no router: attention of any make."""

    @abstractmethod
    def mixing_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a row beside products with weights: of tokens with one another."""

    @abstractmethod
    def forward(self, x_BSD: Tensor, mask_BSS: Tensor | None = None) -> Tensor:
        """Return what is added to the residual stream, shape (B, S, D).

        Args:
            x_BSD: its normed rows.
            mask_BSS: bool, whom each position sees: itself, and those before in its document; None: all before.
        """


def output_gate(config: ModelConfig, layer: int, seed: int, width: int) -> KeyedLinear | None:
    """Return what weighs each channel of the output of all heads; None where nothing does."""
    if config.attention_gate == "none":
        return None
    return KeyedLinear(config.d_model, width, config.d_model**-0.5, seed, f"layers.{layer}.attention.gate")


def gated(y_BSI: Tensor, gate: KeyedLinear | None, x_BSD: Tensor) -> Tensor:
    """Return the outputs of heads, weighed by what attention is given (Qiu et al. 2025, arXiv 2505.06708)."""
    return y_BSI if gate is None else y_BSI * gate(x_BSD).sigmoid()


class Attention(Mixer):
    """Causal self-attention with rotary positions (Su et al. 2021, arXiv 2104.09864)."""

    def __init__(self, config: ModelConfig, seq_len: int, layer: int, seed: int) -> None:
        super().__init__()
        width, inner, self.num_heads = config.d_model, config.attention_width, config.num_heads
        self.kv_heads, head = config.num_kv_heads or self.num_heads, inner // self.num_heads
        std_out = inner**-0.5 / (2 * config.num_layers) ** 0.5
        self.qkv = KeyedLinear(
            width, inner + 2 * self.kv_heads * head, width**-0.5, seed, f"layers.{layer}.attention.qkv"
        )
        self.out = KeyedLinear(inner, width, std_out, seed, f"layers.{layer}.attention.out")
        self.gate = output_gate(config, layer, seed, inner)
        self.rotary = Rotary(head, seq_len, config.rope_base)

    def mixing_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a row's scores and values, of (S + 1) / 2 keys on average."""
        return 2 * (seq_len + 1) * self.out.in_features

    def forward(self, x_BSD: Tensor, mask_BSS: Tensor | None = None) -> Tensor:
        """Return the attention output, shape (B, S, D); ``mask_BSS`` says whom each position attends to."""
        queries, shared = self.num_heads, self.kv_heads
        qkv_BNSH = by_head(self.qkv(x_BSD), queries + 2 * shared)
        qk_BNSH, v_BNSH = torch.split(qkv_BNSH, [queries + shared, shared], dim=1)
        q_BNSH, k_BNSH = self.rotary(qk_BNSH).split((queries, shared), dim=1)
        if shared < queries:
            k_BNSH, v_BNSH = (part.repeat_interleave(queries // shared, dim=1) for part in (k_BNSH, v_BNSH))
        y_BNSH = attend(q_BNSH, k_BNSH, v_BNSH, mask_BSS)
        y_BSD: Tensor = self.out(gated(y_BNSH.transpose(1, 2).flatten(2), self.gate, x_BSD))
        return y_BSD


class RoutedAttention(Recomputing, ABC):
    """Attention of which some projections are experts: its sites decide, by what it is given, and then it runs."""

    @property
    @abstractmethod
    def sites(self) -> Sequence[AttentionExperts | HeadProjection]:
        """Its routed sites, in their order."""

    @abstractmethod
    def mixing_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a row's scores and values, whatever its route."""

    def forward(
        self, x_BSD: Tensor, context: RoutingContext, mask_BSS: Tensor | None = None
    ) -> tuple[Tensor, dict[Site, RoutingDecision]]:
        """Return the attention output, shape (B, S, D), and the decisions that were run, by site.

        Args:
            x_BSD: what it is given.
            context: of its rows.
            mask_BSS: whom each position attends to.
        """
        x_TD, made = x_BSD.flatten(0, 1), dict[Site, RoutingDecision]()
        for site in self.sites:
            shape = site.router.shape
            here = context.at(shape, {**context.earlier, **made})
            made[shape.site] = decide(site.router, x_TD, here, site.config)
        return cast("tuple[Tensor, dict[Site, RoutingDecision]]", self.forgetting(self.run, x_BSD, made, mask_BSS))

    @abstractmethod
    def run(
        self, x_BSD: Tensor, made: Mapping[Site, RoutingDecision], mask_BSS: Tensor | None = None
    ) -> tuple[Tensor, dict[Site, RoutingDecision]]:
        """Return the attention output of decisions, shape (B, S, D), and these with what their routers wish for."""


class AttentionExperts(RoutedAttention):
    """Mixture of attention heads (Zhang et al. 2022, arXiv 2210.05144; JetMoE, arXiv 2404.07413).

    An expert is a group of num_heads / k query heads with an output projection; keys and values, as many heads wide,
    are shared by all experts. A token's k experts are thus as many query heads as plain attention has.
    """

    def __init__(self, config: ModelConfig, seq_len: int, layer: int, seed: int, router: Router, backend: str) -> None:
        super().__init__()
        self.config, self.router, self.backend = config, router, backend
        self.num_heads = config.num_heads // config.k
        width, head = config.d_model, config.attention_width // config.num_heads
        inner, key = self.num_heads * head, f"layers.{layer}.attention"
        self.kv = KeyedLinear(width, 2 * inner, width**-0.5, seed, f"{key}.kv")
        self.query_EPD = nn.Parameter(torch.empty(config.attention_experts, inner, width))
        self.out_EDP = nn.Parameter(torch.empty(config.attention_experts, width, inner))
        std_out = (2 * config.num_layers * config.attention_width) ** -0.5
        for expert in range(config.attention_experts):
            seeding.init_normal(self.query_EPD[expert], width**-0.5, seed, f"{key}.experts.query", expert)
            seeding.init_normal(self.out_EDP[expert], std_out, seed, f"{key}.experts.out", expert)
        self.rotary = Rotary(head, seq_len, config.rope_base)

    @property
    def pair_weights(self) -> list[nn.Parameter]:
        """The weights of all experts."""
        return [self.query_EPD, self.out_EDP]

    @property
    def pair_parameters(self) -> int:
        """The weights that a pair runs."""
        return sum(parameter[0].numel() for parameter in self.pair_weights)

    @property
    def sites(self) -> Sequence[AttentionExperts]:
        """Itself."""
        return [self]

    def mixing_flops(self, seq_len: int) -> int:
        """None: a pair has its own."""
        return 0

    def pair_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a pair: its projections, and scores and values of (S + 1) / 2 keys on average."""
        return 2 * self.pair_parameters + 2 * (seq_len + 1) * self.query_EPD.shape[1]

    def run(
        self, x_BSD: Tensor, made: Mapping[Site, RoutingDecision], mask_BSS: Tensor | None = None
    ) -> tuple[Tensor, dict[Site, RoutingDecision]]:
        """Return the attention output of a decision, shape (B, S, D), and the decision with what the router wishes
        for.
        """
        ((site, decision),) = made.items()
        dtype, x_TD = compute_dtype(x_BSD), x_BSD.flatten(0, 1)
        plan = make_plan(decision)
        with torch.autocast(x_TD.device.type, enabled=False):
            q_RP = gather_linear(x_TD.to(dtype), plan, self.query_EPD.to(dtype), self.backend)
        y_RP = self._attend(q_RP, x_BSD, decision, plan.pairs_R, mask_BSS)
        with torch.autocast(x_TD.device.type, enabled=False):
            out_EDP = self.out_EDP.to(dtype)
            if "outputs" in self.router.wishes:
                run = wishes.alone(decision, dtype)  # its rows are in the same order
                outputs_RD = linear_combine(y_RP, make_plan(run), out_EDP, run.gates_R, self.backend)
                out_TD, decision = wishes.combine(outputs_RD, decision)
            else:
                out_TD = linear_combine(y_RP, plan, out_EDP, decision.gates_R, self.backend)
        return add_beside_pairs(out_TD, decision, x_TD.to(dtype)).view_as(x_BSD), {site: decision}

    def _attend(
        self, q_RP: Tensor, x_BSD: Tensor, decision: RoutingDecision, pairs_R: Tensor, mask_BSS: Tensor | None
    ) -> Tensor:
        """Let the queries of each pair, in the plan's order, attend to their sequence; shapes (R, P)."""
        batch, length, _ = x_BSD.shape
        places, slots = _slots(decision)
        slot_R = places[pairs_R]
        q_QP = q_RP.new_zeros(batch * length * slots + 1, q_RP.shape[1]).index_copy(0, slot_R, q_RP)[:-1]
        q_BNSH = q_QP.view(batch, length, slots * self.num_heads, -1).transpose(1, 2)
        kv_BNSH = by_head(self.kv(x_BSD), 2 * self.num_heads)
        k_BNSH, v_BNSH = (part_BNSH.repeat(1, slots, 1, 1) for part_BNSH in kv_BNSH.chunk(2, dim=1))
        y_BNSH = attend(self.rotary(q_BNSH), self.rotary(k_BNSH), v_BNSH, mask_BSS)
        y_QP = y_BNSH.transpose(1, 2).reshape(batch * length * slots, -1)
        return y_QP[slot_R.clamp(max=len(y_QP) - 1)]


def _slots(decision: RoutingDecision) -> tuple[Tensor, int]:
    """Return each pair's own place among (token, slot) pairs, and the slots per token; unused pairs share a place
    behind all others.

    A pair's slot is its rank among its token's choices, or its expert where experts choose.
    """
    if decision.k is not None:
        return torch.arange(len(decision.token_ids_R), device=decision.token_ids_R.device), decision.k
    experts = decision.num_experts
    places_R = decision.token_ids_R * experts + decision.expert_ids_R
    return torch.where(decision.used_R, places_R, decision.num_tokens * experts), experts
