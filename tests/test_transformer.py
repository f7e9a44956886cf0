"""The transformer against one written out in the slowest obvious way, and laws that each of its blocks must keep.

Shape suffixes: B sequences, S sequence length, T = B * S tokens, V vocabulary, D model width, H head width, E experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.config import ModelConfig
from rlroute.model import Transformer
from rlroute.routing import RoutingDecision
from tests.conftest import draw
from tests.tiny import V, make_batch, make_model, run_tokens, shake, small_config

# The model by its definition: one number after the other, tokens and heads in loops


@dataclass(frozen=True)
class Oracle:
    """A transformer from the named weights of a model and the pairs that its routers chose."""

    config: ModelConfig
    weights: dict[str, Tensor]

    def logits(self, tokens_BS: Tensor, decisions: list[RoutingDecision]) -> Tensor:
        """Return logits of shape (B, S, V)."""
        length = tokens_BS.shape[1]
        stream = [self.weights["embed.weight"][token] for token in tokens_BS.flatten().tolist()]
        routed = iter(decisions)
        for layer in range(self.config.num_layers):
            name = f"layers.{layer}"
            normed = [self.norm(x_D, f"{name}.attention_norm") for x_D in stream]
            for start in range(0, len(stream), length):
                attended = self.attention(normed[start : start + length], f"{name}.attention")
                for offset, y_D in enumerate(attended):
                    stream[start + offset] = stream[start + offset] + y_D
            normed = [self.norm(x_D, f"{name}.ffn_norm") for x_D in stream]
            if f"{name}.mlp.experts.in_EHD" in self.weights:
                added = [self.expert(x_D, f"{name}.mlp.experts", 0) for x_D in normed]
            else:
                added = self.moe(normed, next(routed), f"{name}.moe")
            stream = [x_D + y_D for x_D, y_D in zip(stream, added, strict=True)]
        unembed_VD = self.weights.get("unembed.weight", self.weights["embed.weight"])
        rows = [unembed_VD @ self.norm(x_D, "norm") for x_D in stream]
        return torch.stack(rows).view(*tokens_BS.shape, -1)

    def norm(self, x_D: Tensor, name: str) -> Tensor:
        """RMSNorm (Zhang and Sennrich 2019): over the root of the mean square, times a gain."""
        return x_D / ((x_D * x_D).sum() / len(x_D)).sqrt() * self.weights[f"{name}.weight"]

    def attention(self, x_SD: list[Tensor], name: str) -> list[Tensor]:
        """One sequence; the heads of query, key and value lie one after the other, and neighbouring query heads share
        one of the others.
        """
        parts = self.latent_heads(x_SD, name) if self.config.kv_rank else self.plain_heads(x_SD, name)
        outputs = [torch.cat(found) for found in zip(*(self.head(part) for part in parts), strict=True)]
        return [self.weights[f"{name}.out.weight"] @ output for output in outputs]

    def plain_heads(self, x_SD: list[Tensor], name: str) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
        """Query, key and value of each head and position, turned."""
        heads, shared = self.config.num_heads, self.config.num_kv_heads or self.config.num_heads
        rows = [(self.weights[f"{name}.qkv.weight"] @ x_D).view(heads + 2 * shared, -1) for x_D in x_SD]
        places = [(head, heads + head * shared // heads) for head in range(heads)]
        return [
            [(self.rotate(row[q], s), self.rotate(row[k], s), row[k + shared]) for s, row in enumerate(rows)]
            for q, k in places
        ]

    def latent_heads(self, x_SD: list[Tensor], name: str) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
        """The same of latent attention: each part of a head by its rows (arXiv 2405.04434, appendix C)."""
        (plain, turning, value), rank = self.config.latent_widths, self.config.kv_rank
        parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(self.config.num_heads)]
        for position, x_D in enumerate(x_SD):
            c_D = x_D
            if self.config.q_rank:
                c_D = self.norm(self.weights[f"{name}.q_down.weight"] @ x_D, f"{name}.q_norm")
            c_R = self.norm(self.weights[f"{name}.kv_down.weight"][:rank] @ x_D, f"{name}.kv_norm")
            shared_H = self.rotate(self.weights[f"{name}.kv_down.weight"][rank:] @ x_D, position)
            for head, found in enumerate(parts):
                up_HD = self.weights[f"{name}.q_up.weight"][head * (plain + turning) :]
                made_HR = self.weights[f"{name}.kv_up.weight"][head * (plain + value) :]
                turned_H = self.rotate(up_HD[plain : plain + turning] @ c_D, position)
                q_H = torch.cat((up_HD[:plain] @ c_D, turned_H))
                k_H = torch.cat((made_HR[:plain] @ c_R, shared_H))
                found.append((q_H, k_H, made_HR[plain : plain + value] @ c_R))
        return parts

    def head(self, qkv_S3H: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """One head: softmax over all positions, -inf at later ones."""
        queries, keys = [q_H for q_H, _, _ in qkv_S3H], [k_H for _, k_H, _ in qkv_S3H]
        outputs = []
        for here, query in enumerate(queries):
            scores_S = torch.stack([query @ key / math.sqrt(len(query)) for key in keys])
            later_S = torch.arange(len(keys)) > here
            weights_S = scores_S.masked_fill(later_S, -math.inf).softmax(0)
            outputs.append(sum((w * v_H for w, (_, _, v_H) in zip(weights_S, qkv_S3H, strict=True)), torch.zeros(())))
        return outputs

    def rotate(self, x_H: Tensor, position: int) -> Tensor:
        """Turn the plane of coordinates i and i + H / 2 by position * base^(-2 i / H)."""
        half = len(x_H) // 2
        turned = list(x_H)
        for i in range(half):
            angle = position * self.config.rope_base ** (-2 * i / len(x_H))
            turned[i] = math.cos(angle) * x_H[i] - math.sin(angle) * x_H[i + half]
            turned[i + half] = math.sin(angle) * x_H[i] + math.cos(angle) * x_H[i + half]
        return torch.stack(turned)

    def moe(self, x_TD: list[Tensor], decision: RoutingDecision, name: str) -> list[Tensor]:
        """The sum over the decision's kept pairs, and over the shared experts."""
        added = [torch.zeros_like(x_D) for x_D in x_TD]
        pairs = zip(decision.token_ids_R.tolist(), decision.expert_ids_R.tolist(), strict=True)
        gates_R = self.gates(x_TD, decision, f"{name}.router.scores.weight")
        for (token, expert), kept, gate in zip(pairs, decision.kept_R.tolist(), gates_R, strict=True):
            if kept:
                added[token] = added[token] + gate * self.expert(x_TD[token], f"{name}.experts", expert)
        if f"{name}.shared.experts.in_EHD" in self.weights:
            shared = [self.expert(x_D, f"{name}.shared.experts", 0) for x_D in x_TD]
            added = [y_D + more_D for y_D, more_D in zip(added, shared, strict=True)]
        return added

    def gates(self, x_TD: list[Tensor], decision: RoutingDecision, scores: str) -> list[Tensor]:
        """Softmax over all experts, renormalised over the chosen where k > 1; 1 / k where nothing scores."""
        k = self.config.k
        if scores not in self.weights:
            return [torch.full((), 1 / k, dtype=torch.float64)] * len(decision.gates_R)
        gates = []
        for token, x_D in enumerate(x_TD):
            odds_E = (self.weights[scores] @ x_D).exp()
            chosen = decision.expert_ids_R[token * k : (token + 1) * k].tolist()
            total = sum((odds_E[e] for e in chosen), torch.zeros(())) if k > 1 else odds_E.sum()
            gates += [odds_E[e] / total for e in chosen]
        return gates

    def expert(self, x_D: Tensor, name: str, expert: int) -> Tensor:
        """One row through one expert; the gate rows of SwiGLU come first."""
        hidden = self.weights[f"{name}.in_EHD"][expert] @ x_D
        if self.config.activation == "swiglu":
            gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
            hidden = gate / (1 + (-gate).exp()) * up
        elif self.config.activation == "gelu":
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        else:
            hidden = torch.where(hidden > 0, hidden, 0.0)
        return self.weights[f"{name}.out_EDF"][expert] @ hidden


CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "dense, gelu, one head": (None, {"activation": "gelu", "num_heads": 1}),
    "dense, heads of another width": (None, {"head_width": 6}),
    "dense, shared keys and values": (None, {"num_heads": 4, "num_kv_heads": 2, "head_width": 2}),
    "dense, keys and values from a latent": (None, {"kv_rank": 3, "value_width": 3}),
    "switch, queries from a latent too": ("switch", {"kv_rank": 3, "q_rank": 5, "head_width": 2, "rope_width": 4}),
    "dense, one matrix for both embeddings": (None, {"tie_embeddings": True}),
    "switch": ("switch", {}),
    "switch, one expert a token, relu": ("switch", {"k": 1, "activation": "relu"}),
    "hash, shared experts": ("hash", {"num_shared_experts": 2}),
    "switch, first layer dense, base 100": ("switch", {"num_layers": 3, "num_dense_layers": 1, "rope_base": 100.0}),
    "switch, capacity": ("switch", {"capacity_factor": 0.6, "num_shared_experts": 1}),
}


@pytest.mark.parametrize(("router", "fields"), CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_are_those_of_the_definition(router: str | None, fields: dict[str, Any]) -> None:
    """The rotations' table is float32 in every precision, hence the tolerance."""
    config = small_config(**fields)
    model = shake(make_model(router, config))
    tokens_BS = torch.from_numpy(make_batch(length=7).tokens_BS)
    logits_BSV, decisions = run_tokens(model, tokens_BS)
    want_BSV = Oracle(config, dict(model.named_parameters())).logits(tokens_BS, decisions)
    torch.testing.assert_close(logits_BSV, want_BSV, rtol=1e-5, atol=1e-6)
    direction_BSV = draw(*logits_BSV.shape)
    found, want = (
        torch.autograd.grad((logits * direction_BSV).sum(), list(model.parameters()), allow_unused=True)
        for logits in (logits_BSV, want_BSV)
    )
    assert len(decisions) == (0 if router is None else config.num_layers - config.num_dense_layers)
    for (name, parameter), one, other in zip(model.named_parameters(), found, want, strict=True):
        assert one is not None and other is not None and one.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=f"{name} {tuple(parameter.shape)}")


def test_the_capacity_case_above_drops_some_pairs_and_keeps_others() -> None:
    router, fields = CASES["switch, capacity"]
    model = shake(make_model(router, small_config(**fields)))
    _, decisions = run_tokens(model, torch.from_numpy(make_batch(length=7).tokens_BS))
    assert all(0 < int(decision.kept_R.sum()) < len(decision.kept_R) for decision in decisions)


# Capacity


@pytest.mark.parametrize(("factor", "capacity"), [(0.5, 4), (0.52, 5), (0.625, 5), (0.63, 6), (0.01, 1)])
def test_capacity_is_the_fair_share_times_the_factor_rounded_up(factor: float, capacity: int) -> None:
    """A token runs 2 of 4 experts, so that the fair share of 16 tokens is 8 pairs; all want the same two experts."""
    model = make_model("hash", small_config(capacity_factor=factor))
    _, decisions = run_tokens(model, torch.full((2, 8), 3))
    for decision in decisions:
        assert sorted(decision.demand_E().tolist()) == [0, 0, 16, 16]
        assert sorted(decision.load_E().tolist()) == [0, 0, capacity, capacity]


# Attention


@pytest.mark.parametrize("router", [None, "switch", "hash"])
def test_a_later_token_changes_no_earlier_logits(router: str | None) -> None:
    model = shake(make_model(router, small_config()))
    tokens_BS = torch.from_numpy(make_batch().tokens_BS)
    logits_BSV, _ = run_tokens(model, tokens_BS)
    for position in range(tokens_BS.shape[1]):
        changed_BS = tokens_BS.clone()
        changed_BS[0, position] = (changed_BS[0, position] + 1) % V
        moved_BSV = (run_tokens(model, changed_BS)[0] - logits_BSV).abs()
        assert moved_BSV[1].max() < 1e-12, "another sequence"
        assert position == 0 or moved_BSV[0, :position].max() < 1e-12
        assert bool((moved_BSV[0, position:].amax(1) > 1e-9).all()), "every later position attends to this one"


def test_the_order_of_earlier_tokens_matters() -> None:
    """Without positions, the last token of a single layer would see its past as a set."""
    model = shake(make_model(None, small_config(num_layers=1)))
    last_V, swapped_V = (run_tokens(model, torch.tensor([order]))[0][0, -1] for order in ([1, 2, 3, 4], [2, 1, 3, 4]))
    assert (last_V - swapped_V).abs().max() > 1e-3


LENGTH = 8


def attention_weights(model: Transformer, features_D: Tensor) -> Tensor:
    """Read softmax weights of shape (S, S) out of a layer with one head, at tokens that are alike but for a mark.

    The mark says a token's position. It does not enter queries and keys, and it alone is the value, so that a row of
    the output is a row of softmax weights.
    """
    attention: Any = model.layers[0].attention
    width = len(features_D) + LENGTH
    with torch.no_grad():
        query, key, value = attention.qkv.weight.view(3, width, width)
        query[:, -LENGTH:] = key[:, -LENGTH:] = 0
        value.copy_(torch.diag((torch.arange(width) >= width - LENGTH).double()))
        attention.out.weight.copy_(torch.eye(width))
        x_SD = torch.cat([features_D.expand(LENGTH, -1), torch.eye(LENGTH).double()], dim=1)
        weights_SS: Tensor = attention(x_SD[None])[0, :, -LENGTH:]
    return weights_SS


def test_attention_scores_depend_on_the_distance_of_positions_and_on_nothing_else_of_them() -> None:
    model = shake(make_model(None, small_config(num_layers=1, d_model=8 + LENGTH, num_heads=1), seq_len=LENGTH))
    log_weights_SS = attention_weights(model, draw(8)).log()
    by_distance = [
        [float(log_weights_SS[here, here - distance] - log_weights_SS[here, here]) for here in range(distance, LENGTH)]
        for distance in range(LENGTH)
    ]
    for scores in by_distance:
        assert scores == pytest.approx([scores[0]] * len(scores), abs=1e-5)
    assert len({round(scores[0], 3) for scores in by_distance}) == LENGTH, "every distance scores differently"
    assert not log_weights_SS.exp().triu(1).any(), "none is later"


# Initial weights

WIDE = small_config(num_layers=3, d_model=64, num_dense_layers=1, d_expert=48, num_shared_experts=1)
STD = {
    "embed.weight": 64**-0.5,
    "unembed.weight": 64**-0.5,
    "attention.qkv.weight": 64**-0.5,
    "attention.out.weight": (64 * 2 * 3) ** -0.5,
    "mlp.experts.in_EHD": 64**-0.5,
    "mlp.experts.out_EDF": (3 * 48 * 2 * 3) ** -0.5,
    "moe.experts.in_EHD": 64**-0.5,
    "moe.experts.out_EDF": (48 * 2 * 3) ** -0.5,
    "moe.shared.experts.in_EHD": 64**-0.5,
    "moe.shared.experts.out_EDF": (48 * 2 * 3) ** -0.5,
    "moe.router.scores.weight": 0.02,
}
"""By the end of a name: 1 over the root of the inputs; where the residual stream is added to, of 2 L as well."""


def test_initial_weights_have_the_standard_deviations_that_the_names_promise() -> None:
    model = make_model("switch", WIDE, vocab_size=128)
    unseen = set(STD)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
            continue
        end = next(end for end in STD if f".{name}".endswith(f".{end}"))
        unseen.discard(end)
        values = parameter.detach().flatten()
        error = STD[end] / math.sqrt(len(values))
        assert abs(float(values.mean())) < 4 * error, name
        assert float(values.std()) == pytest.approx(STD[end], abs=4 * error / math.sqrt(2)), name
    assert not unseen


@pytest.mark.parametrize(
    "fields",
    [
        {"num_shared_experts": 1, "expert_bias": True, "attention_experts": 4},
        {"tie_embeddings": True, "kv_rank": 4, "mixers": "mamba2+attention"},
    ],
)
def test_the_variance_of_initial_weights_is_scaled_but_for_embeddings_and_routers(fields: dict[str, Any]) -> None:
    usual, tenth = (make_model("switch", small_config(init_scale=scale, **fields)) for scale in (1.0, 0.1))
    found = dict(tenth.named_parameters())
    for name, parameter in usual.named_parameters():
        scaled = parameter.dim() > 1 and not name.startswith("embed.") and ".router." not in name
        torch.testing.assert_close(found[name], parameter * (0.1**0.5 if scaled else 1.0), rtol=1e-6, atol=0)


def test_no_two_matrices_start_alike() -> None:
    model = make_model("switch", small_config(num_shared_experts=1))
    matrices = [p.detach() for p in model.parameters() if p.dim() > 1]
    matrices = [matrix for p in matrices for matrix in (p.unbind(0) if p.dim() == 3 else [p])]
    corners = {tuple(matrix[0, :4].tolist()) for matrix in matrices}
    assert len(corners) == len(matrices) > 20
