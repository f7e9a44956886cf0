"""``rlroute export-tokens``: the last MoE layer of a trained run as a bandit, every expert's counterfactual loss exact.

After the last attention a token's route changes no other token. So the loss that each expert would have brought each
validation token, alone among the routed ones and with gate 1, follows from the residual stream before the layer: one
pass of the layers below, then one of the experts, the last norm and the unembedding for each expert. ``rlroute play
TokenBandit-v0 --table FILE`` plays it.

Shape suffixes: B sequences, S sequence length, T = B * S tokens, N tokens of the table, D model width, E experts, V
vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlroute.config import RunConfig
from rlroute.envs.tables import TokenTable
from rlroute.errors import ConfigError
from rlroute.experiments.checkpoints.trained import open_routed
from rlroute.model import Transformer
from rlroute.model.transformer import Block
from rlroute.routing import RoutingDecision
from rlroute.schema import RunRecord
from rlroute.training.batches import Batch, eval_batches
from rlroute.training.step import Device, make_context


def token_table(record: RunRecord, store: Path, tokens: int) -> TokenTable:
    """Return the table of a run's last MoE layer over validation tokens.

    Args:
        record: the run.
        store: the run store that holds its checkpoint.
        tokens: about how many; whole batches.

    Raises:
        ConfigError: the run's last layer has no experts, or it was made from other code or data.
        StoreError: its checkpoint is not there.
        CheckpointError, DataError: its checkpoint or its corpus cannot be read.
    """
    run = open_routed(record, store)
    config = run.config
    if config.model.num_layers - 1 not in config.model.moe_layers:
        raise ConfigError(f"run {record.id} has a dense last layer: want one whose last layer has experts")
    model = run.model
    if config.train.param_dtype == "bfloat16":
        model.float()  # outcomes are in float32, and rounded weights are the same there
    batches = eval_batches(
        run.corpus, num_tokens=tokens, batch_size=config.train.batch_size, seq_len=config.data.seq_len
    )
    parts = [_outcomes(model, config, batch, run.device) for batch in batches]
    return TokenTable(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


@torch.no_grad()
def _outcomes(model: Transformer, config: RunConfig, batch: Batch, device: Device) -> dict[str, Any]:
    """Return the table's arrays for a batch."""
    block = model.layers[-1]
    assert isinstance(block, Block) and block.moe is not None
    moe = block.moe
    seen: list[Tensor] = []
    hook = block.ffn_norm.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    context = make_context(batch, device, seed=0, step=0, progress=1.0, explore=False)
    try:
        with device.autocast():
            _, decisions = model(torch.from_numpy(batch.tokens_BS).to(device.name), context)
    finally:
        hook.remove()
    residual_TD, x_TD = (tensor.flatten(0, 1).float() for tensor in seen)
    targets_T = torch.from_numpy(batch.targets_BS).reshape(-1).to(device.name)
    shape = moe.router.shape
    if moe.shared is not None:  # every token runs these, whatever its route
        residual_TD = residual_TD + moe.run_shared(x_TD, decisions[-1].shared_gates_TS)

    def loss(y_TD: Tensor) -> Tensor:
        logits_TV = model.unembed(model.norm(residual_TD + y_TD)).float()
        return functional.cross_entropy(logits_TV, targets_T, reduction="none")

    def alone(expert: int) -> Tensor:
        ids_T1 = torch.full((len(x_TD), 1), expert, device=x_TD.device)
        gates_T1, free = torch.ones_like(ids_T1, dtype=torch.float32), shape.num_free_experts
        decision = RoutingDecision.token_choice(ids_T1, gates_T1, shape.num_experts, num_free_experts=free)
        out_TD, _ = moe.start_experts(x_TD, decision, context)()
        return out_TD if moe.free is None else out_TD + moe.free(x_TD, decision)

    losses_TE = torch.stack([loss(alone(expert)) for expert in range(shape.num_experts)], dim=1)
    domains = batch.domains_BS
    return {
        "x_ND": x_TD.cpu().numpy(),
        "losses_NE": losses_TE.cpu().numpy(),
        "skip_N": loss(torch.zeros_like(x_TD)).cpu().numpy(),
        "token_ids_N": batch.tokens_BS.reshape(-1).astype(np.int64),
        "labels_N": np.full(batch.tokens_BS.size, -1) if domains is None else domains.reshape(-1).astype(np.int64),
    }
