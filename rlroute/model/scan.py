"""Mixing by a state of fixed size: what Mamba-2, gated delta nets and Kimi Delta Attention have in common.

A head's state is a matrix. At each position it decays, takes in a value at a key, and is read by a query:

    state = decay * state + key u^T,    output = state^T query.

u is the value itself (state-space duality, Dao and Gu 2024, arXiv 2405.21060), or by the delta rule a share beta of
what the decayed state lacks of it at that key (Yang et al. 2024, arXiv 2412.06464). A decay is one number a head, or
one for each channel of keys (Kimi Delta Attention, arXiv 2510.26692). Positions are taken in chunks: within one all of
them at once, by products of matrices; from one to the next goes the state. It is in float32 at least.

Shape suffixes: B sequences, S sequence length, C positions of a chunk, N heads, K key width, V value width, G one or K,
I channels, W width of a convolution.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute import seeding
from rlroute.model.attention import by_head

CHUNK = 32
"""Positions of a chunk."""
CONVOLUTION = 4
"""Positions that a short convolution sees; every published model has as many."""


def scan(
    q_BNSK: Tensor,
    k_BNSK: Tensor,
    v_BNSV: Tensor,
    log_decay_BNSG: Tensor,
    beta_BNS: Tensor | None,
    mask_BSS: Tensor,
    chunk: int = CHUNK,
) -> Tensor:
    """Return what each position reads of its state, shape (B, N, S, V).

    Args:
        q_BNSK, k_BNSK, v_BNSV: queries, keys and values.
        log_decay_BNSG: logarithm of the decay before each position, at most 0.
        beta_BNS: of the delta rule; None: values are taken in as they are.
        mask_BSS: bool, whom each position sees: a state begins anew with a document.
        chunk: positions that are taken at once.
    """
    state_BNKV = q_BNSK.new_zeros(*k_BNSK.shape[:2], k_BNSK.shape[-1], v_BNSV.shape[-1])
    read = []
    for start in range(0, q_BNSK.shape[2], chunk):
        rows = slice(start, start + chunk)
        within_BCC, before_BC = mask_BSS[:, None, rows, rows], mask_BSS[:, None, rows, max(start - 1, 0), None]
        beta_BNC = None if beta_BNS is None else beta_BNS[:, :, rows]
        q_BNCK, k_BNCK, v_BNCV = q_BNSK[:, :, rows], k_BNSK[:, :, rows], v_BNSV[:, :, rows]
        y_BNCV, state_BNKV = _chunk(
            state_BNKV, q_BNCK, k_BNCK, v_BNCV, log_decay_BNSG[:, :, rows], beta_BNC, within_BCC, before_BC
        )
        read.append(y_BNCV)
    return torch.cat(read, 2)


def _chunk(
    state_BNKV: Tensor,
    q_BNCK: Tensor,
    k_BNCK: Tensor,
    v_BNCV: Tensor,
    log_decay_BNCG: Tensor,
    beta_BNC: Tensor | None,
    within_BCC: Tensor,
    before_BC: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return what the positions of a chunk read, and the state after it; which of them see one another, and which see
    the state from before.
    """
    passed_BNCG = log_decay_BNCG.cumsum(2)
    between_BNCCG = passed_BNCG[:, :, :, None] - passed_BNCG[:, :, None]
    decay_BNCCG = between_BNCCG.masked_fill(~within_BCC[..., None], -math.inf).exp()
    decayed_BNCG = passed_BNCG.exp() * before_BC
    if beta_BNC is not None:
        lacking_BNCV = beta_BNC[..., None] * (v_BNCV - (k_BNCK * decayed_BNCG) @ state_BNKV)
        mixed_BNCC = beta_BNC[..., None] * _scores(k_BNCK, k_BNCK, decay_BNCCG)
        v_BNCV = torch.linalg.solve_triangular(mixed_BNCC, lacking_BNCV, upper=False, unitriangular=True)
    y_BNCV = (q_BNCK * decayed_BNCG) @ state_BNKV + _scores(q_BNCK, k_BNCK, decay_BNCCG) @ v_BNCV
    taken_BNKV = (k_BNCK * decay_BNCCG[:, :, -1]).transpose(2, 3) @ v_BNCV
    return y_BNCV, decayed_BNCG[:, :, -1, :, None] * state_BNKV + taken_BNKV


def _scores(q_BNCK: Tensor, k_BNCK: Tensor, decay_BNCCG: Tensor) -> Tensor:
    """Return products of queries and keys, decayed from the keys' positions to the queries', shape (B, N, C, C)."""
    if decay_BNCCG.shape[-1] == 1:
        return q_BNCK @ k_BNCK.transpose(2, 3) * decay_BNCCG.squeeze(-1)
    return torch.einsum("bnijk,bnjk->bnij", q_BNCK[:, :, :, None] * decay_BNCCG, k_BNCK)


def scan_flops(seq_len: int, heads: int, key: int, value: int, delta: bool) -> int:
    """Return the forward FLOPs of a position, over a sequence on average: of products of matrices, and of the delta
    rule's triangular systems.
    """
    sizes = [min(CHUNK, seq_len - start) for start in range(0, seq_len, CHUNK)]
    rows, pairs = sum(sizes), sum(size * size for size in sizes)
    flops = 2 * pairs * (key + value) + 4 * rows * key * value
    flops += (pairs * (2 * key + value) + 2 * rows * key * value) * delta
    return heads * flops // seq_len


class ShortConvolution(nn.Module):
    """A causal convolution of each channel by itself, within a document, and SiLU."""

    def __init__(self, channels: int, seed: int, name: str, *, bias: bool = False) -> None:
        super().__init__()
        self.weight_IW = nn.Parameter(torch.empty(channels, CONVOLUTION))
        seeding.init_normal(self.weight_IW, CONVOLUTION**-0.5, seed, name)
        self.bias_I = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x_BSI: Tensor, mask_BSS: Tensor) -> Tensor:
        """Return as many channels, in float32 at least; ``mask_BSS`` says whom each position sees."""
        x_BSI, length = x_BSI.to(torch.promote_types(x_BSI.dtype, torch.float32)), x_BSI.shape[1]
        weight_IW = self.weight_IW.to(x_BSI.dtype)
        out_BSI = x_BSI * weight_IW[:, -1]
        for back in range(1, min(CONVOLUTION, length)):
            seen_BS = mask_BSS.diagonal(-back, 1, 2)
            earlier_BSI = x_BSI[:, :-back] * seen_BS[..., None] * weight_IW[:, -1 - back]
            out_BSI = out_BSI + functional.pad(earlier_BSI, (0, 0, back, 0))
        return functional.silu(out_BSI if self.bias_I is None else out_BSI + self.bias_I)


class Decay(nn.Module):
    """How much of a state goes by at a position, as Mamba-2 has it: a step of learned size, times a rate of the head.

    Rates start between 1 and 16, and steps between 0.001 and 0.1, evenly in their logarithm.
    """

    def __init__(self, heads: int, channels: int, seed: int, name: str) -> None:
        super().__init__()
        drawn_NG = seeding.keyed_uniform(seeding.derive_key(seed, name), (torch.arange(heads),), (1 + channels,))
        step_NG = (math.log(0.001) + drawn_NG[:, 1:] * math.log(100)).exp()
        self.log_rate_N = nn.Parameter((1 + 15 * drawn_NG[:, 0]).log())
        self.bias_I = nn.Parameter((step_NG + (-torch.expm1(-step_NG)).log()).flatten())  # softplus undone

    def forward(self, x_BSI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the steps, and the logarithms of what is left after them, both of shape (B, N, S, G).

        Args:
            x_BSI: before the softplus, one channel after the other of each head.
        """
        step_BSI = functional.softplus(x_BSI.to(self.bias_I.dtype) + self.bias_I)
        step_BNSG = by_head(step_BSI, len(self.log_rate_N))
        return step_BNSG, -self.log_rate_N.exp()[:, None, None] * step_BNSG


def everything(x_BSI: Tensor) -> Tensor:
    """Return the mask by which each position sees itself and all before it, shape (1, S, S)."""
    return torch.ones(1, x_BSI.shape[1], x_BSI.shape[1], dtype=torch.bool, device=x_BSI.device).tril()
