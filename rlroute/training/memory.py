"""What a run needs of memory at the very least, found by arithmetic before a model is built or a batch is cut."""

import torch

from rlroute.config import RunConfig
from rlroute.errors import ConfigError
from rlroute.kernels.activations import hidden_rows
from rlroute.machine import memory


def least_parameters(config: RunConfig, vocab_size: int, expert_shards: int = 1) -> int:
    """Return the parameters of a run's model in one process, without those of norms, routers and attention's experts.

    Args:
        config: the run's.
        vocab_size: V.
        expert_shards: into how many shards the experts are cut.
    """
    model, width = config.model, config.model.d_model
    matrices = hidden_rows(model.activation, 1) + 1
    routed = len(model.moe_layers) if config.router is not None else 0
    dense = model.num_layers - len(model.moe_layers)
    shared = model.num_shared_experts * model.d_expert
    inner = model.d_latent or width
    hidden = routed * shared
    hidden += dense * (model.d_dense or model.active_width) + (model.num_layers - dense - routed) * model.active_width
    attention = 0 if model.attention_experts and routed else 4 * width**2 * model.num_layers
    experts = routed * (model.num_experts // expert_shards) * model.d_expert * inner * matrices
    return 2 * vocab_size * width + attention + hidden * width * matrices + experts


def least_bytes(config: RunConfig, vocab_size: int, expert_shards: int = 1) -> int:
    """Return the bytes of weights, gradients and moments, and of what a micro-batch's backward pass keeps: each layer's
    input and hidden values, the logits and their gradient.
    """
    train, model = config.train, config.model
    size = 8 if train.dtype == "float64" else 4
    kept = {"bfloat16": 2}.get(train.dtype, size)
    tokens = train.batch_size // train.micro_batches * config.data.seq_len
    experts = len(model.moe_layers)
    hidden = model.num_layers * model.d_model + experts * model.active_width
    hidden += (model.num_layers - experts) * (model.d_dense or model.active_width)
    weights = 4 * size * least_parameters(config, vocab_size, expert_shards)
    return weights + tokens * (hidden * kept + 2 * vocab_size * size) + 16 * train.batch_size * config.data.seq_len


def memory_here(device: str) -> int:
    """Return the bytes of memory of this machine, or of what this process may use of it; on cuda of the device."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return memory()


def check_memory(config: RunConfig, vocab_size: int, expert_shards: int = 1) -> None:
    """Refuse a run that cannot fit into this machine's memory, whatever else is there.

    Raises:
        ConfigError: naming what it needs and what there is.
    """
    needed, there = least_bytes(config, vocab_size, expert_shards), memory_here(config.train.device)
    if needed > there:
        model, train = config.model, config.train
        raise ConfigError(
            f"the run needs at least {needed / 2**30:.1f} GiB of memory, this machine has {there / 2**30:.1f}: "
            f"model.num_layers = {model.num_layers}, model.d_model = {model.d_model}, "
            f"model.num_experts = {model.num_experts}, model.d_expert = {model.d_expert}, "
            f"train.batch_size = {train.batch_size} in {train.micro_batches} micro-batches, "
            f"data.seq_len = {config.data.seq_len}, a vocabulary of {vocab_size}"
        )
