"""Models of a few hundred weights and batches of a few tokens, for tests that work a result out by hand; and the
settings of a tiny run.

Shape suffixes: B sequences, S sequence length, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.model import ModelShape, Transformer
from rlroute.registry import router_class
from rlroute.routing import RouterShape, RoutingDecision
from rlroute.training.batches import EVAL_SEQUENCES, Batch
from rlroute.training.step import Device, make_context

V = 11
CPU64 = Device("cpu", torch.float64)
STEPS = 12
DATA = DataConfig(spec="synth:documents=64,length=64", seq_len=16, eval_tokens=128)
MODEL = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_experts=4, k=2, d_expert=8)
TRAIN = TrainConfig(steps=STEPS, batch_size=4, warmup_steps=2, eval_every=4, log_every=1, checkpoint_every=4)


def small_config(**fields: Any) -> ModelConfig:
    """Return two layers of width 8 with 4 experts, of which a token runs 2."""
    defaults = {"num_layers": 2, "d_model": 8, "num_heads": 2, "num_experts": 4, "k": 2, "d_expert": 6}
    return ModelConfig(**(defaults | fields))


def make_model(
    router: str | None,
    config: ModelConfig,
    *,
    seq_len: int = 8,
    vocab_size: int = V,
    dtype: torch.dtype = torch.float64,
    backend: str = "cpu",
    **fields: Any,
) -> Transformer:
    """Return a model at its initial weights, with the named router configured by ``fields``, or dense (None)."""

    def make_router(shape: RouterShape) -> Any:
        assert router is not None
        return router_class(router)(router_class(router).Config(**fields), shape)

    shape = ModelShape(vocab_size=vocab_size, seq_len=seq_len, seed=0, backend=backend)
    return Transformer(config, shape, None if router is None else make_router).to(dtype)


def shake(model: Transformer, std: float = 0.3) -> Transformer:
    """Add noise to every parameter, so that gains differ from 1 and scores from one another; return the model."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def make_batch(sequences: int = 2, length: int = 8, seed: int = 0, vocab_size: int = V) -> Batch:
    """Return windows of uniformly drawn tokens."""
    stream_BS = np.random.default_rng(seed).integers(0, vocab_size, (sequences, length + 1))
    return Batch(stream_BS[:, :-1], stream_BS[:, 1:], EVAL_SEQUENCES + 100 * seed + np.arange(sequences), None)


def run_batch(
    model: Transformer,
    batch: Batch,
    device: Device = CPU64,
    *,
    seed: int = 0,
    step: int = 0,
    explore: bool = False,
) -> tuple[Tensor, list[RoutingDecision]]:
    """Return the logits of a batch, shape (B, S, V), and the decision of each routed layer."""
    context = make_context(batch, device, seed=seed, step=step, explore=explore)
    logits_BSV, decisions = model(torch.from_numpy(batch.tokens_BS), context)
    return logits_BSV, decisions


def run_tokens(model: Transformer, tokens_BS: Tensor) -> tuple[Tensor, list[RoutingDecision]]:
    """Return the logits of tokens, shape (B, S, V), and the decision of each routed layer."""
    return run_batch(model, Batch(tokens_BS.numpy(), tokens_BS.numpy(), np.arange(len(tokens_BS)), None))
