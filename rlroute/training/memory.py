"""What a run needs of memory, found by arithmetic before a model is built or a batch is cut: at the very least, for
refusals, and by part as it is expected to be, for plans.
"""

from collections import Counter
from dataclasses import astuple, dataclass

import torch

from rlroute.config import ModelConfig, RunConfig
from rlroute.errors import ConfigError
from rlroute.kernels.activations import hidden_rows
from rlroute.machine import memory
from rlroute.model.scan import CHUNK
from rlroute.model.transformer import make_mixer
from rlroute.sites import attention_sites

OWN = {"swiglu": 4, "geglu": 4, "swiglu_clamped": 9, "gelu": 2, "relu": 1, "relu_squared": 2}
"""Arrays of (T, F) that an activation in plain autograd keeps: hidden values, what is between, what goes down."""
SCORES = 4
"""Arrays of (T, E) that a router with scores keeps: logits, probabilities, and what its terms make of them."""


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
    attention = 0 if model.attention_experts and routed else mixer_parameters(model)
    experts = routed * (model.num_experts // expert_shards) * model.d_expert * inner * matrices
    return (2 - model.tie_embeddings) * vocab_size * width + attention + hidden * width * matrices + experts


def mixer_parameters(model: ModelConfig) -> int:
    """Return the parameters of all mixers, in a model without experts of attention, but for vectors."""
    found = Counter(kind for layer in range(model.num_layers) for kind in model.mixers_at(layer))
    with torch.device("meta"):
        made = {kind: make_mixer(kind, model, 1, 0, 0) for kind in found}
    return sum(found[kind] * p.numel() for kind in found for p in made[kind].parameters() if p.dim() > 1)


def least_bytes(config: RunConfig, vocab_size: int, expert_shards: int = 1) -> int:
    """Return the bytes of weights, gradients and moments, and of what a micro-batch's backward pass keeps: each layer's
    input and hidden values (of one layer where they are computed again), and of the rows whose logits are there at a
    time these and their gradient. Where parts are frozen, of the weights and the logits alone.
    """
    train, model = config.train, config.model
    size = 8 if train.dtype == "float64" else 4
    kept = {"bfloat16": 2}.get(train.dtype, size)
    tokens = train.batch_size // train.micro_batches * config.data.seq_len
    experts = len(model.moe_layers)
    widths = [model.active_width] * experts
    widths += [model.d_dense or model.active_width] * (model.num_layers - experts)
    hidden = model.num_layers * model.d_model + (max(widths) if train.recompute else sum(widths))
    weights = size * least_parameters(config, vocab_size, expert_shards)
    logits = min(tokens, train.loss_chunk or tokens) * vocab_size * size
    batch = 16 * train.batch_size * config.data.seq_len
    if train.parts != "all":  # there may be no backward at all
        return weights + logits + batch
    return 4 * weights + tokens * hidden * kept + 2 * logits + batch


@dataclass(frozen=True)
class Memory:
    """Bytes by part, expected at the end of a micro-batch's forward, when there are most.

    Attributes:
        weights, gradients, moments: of all parameters; weights with their masters, if they have any.
        copies: of weights in the compute precision, where that is another.
        activations: what blocks keep for backward.
        logits: those that are there at a time, and their gradient.
    """

    weights: int
    gradients: int
    moments: int
    copies: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))


def expected_memory(
    config: RunConfig, parameters: int, vocab_size: int, samples: int = 1, trained: int | None = None
) -> Memory:
    """Return what a run in one process is expected to need, by part.

    Args:
        config: the run's.
        parameters: of its model.
        vocab_size: V.
        samples: M.
        trained: parameters that are not frozen; None: all.
    """
    trained = parameters if trained is None else trained
    train = config.train
    size, compute = _sizes(config)
    rows = train.batch_size // train.micro_batches * config.data.seq_len * samples
    logits = min(rows, train.loss_chunk or rows) * vocab_size * (2 * size + (compute if compute < size else 0))
    stored = 2 if train.param_dtype == "bfloat16" else size
    copied = parameters // config.model.num_layers if train.recompute else parameters  # of a block, while it is there
    return Memory(
        weights=stored * parameters + (size * trained if stored < size else 0),
        gradients=stored * trained,
        moments=2 * size * trained,
        copies=compute * copied if compute < stored else 0,
        activations=rows * kept_of_a_row(config),
        logits=logits,
    )


def kept_of_a_row(config: RunConfig) -> int:
    """Return the bytes that blocks keep for the backward of one row, expected with k pairs a token; where they are
    computed again, also those of the one that is.
    """
    model = config.model
    size, _ = _sizes(config)
    routed = 0 if config.router is None else len(model.moe_layers)
    kept = [_kept_by_block(config, layer) for layer in range(model.num_layers)]
    if not config.train.recompute:
        return sum(kept) + _kept_by_norm(config)
    scores = _kept_by_routers(config)
    inputs = routed * (2 * size * model.d_model + scores) + (model.num_layers - routed) * size * model.d_model
    return inputs + max(kept) + _kept_by_norm(config)


def _sizes(config: RunConfig) -> tuple[int, int]:
    """Return the bytes of a number in residuals and parameters, and in products."""
    size = 8 if config.train.dtype == "float64" else 4
    return size, 2 if config.train.dtype == "bfloat16" else size


def _kept_by_block(config: RunConfig, layer: int) -> int:
    """Return the bytes that a block keeps of a row: two norms, what attention keeps, and of the MLP what its products
    take in.
    """
    model = config.model
    size, compute = _sizes(config)
    routed = config.router is not None and layer in model.moe_layers
    width, rows = model.d_model, hidden_rows(model.activation, 1)
    own = OWN[model.activation]
    dense = model.active_width if layer in model.moe_layers else model.d_dense or model.active_width
    if routed:
        each = rows * model.d_expert
        mlp = model.k * each + 2 * (model.d_latent or 0) + own * model.num_shared_experts * model.d_expert
    else:
        mlp = own * dense
    scores = _kept_by_routers(config) if routed else 0
    wide = width * size if routed and compute < size else 0  # what the router reads
    kinds = model.mixers_at(layer)
    mixers = sum(
        _kept_by_attention(config, routed) if kind == "attention" else size * _numbers_of_scan(config, kind)
        for kind in kinds
    )
    return (1 + len(kinds)) * _kept_by_norm(config) + mixers + compute * mlp + scores + wide


def _kept_by_attention(config: RunConfig, routed: bool) -> int:
    """Return the bytes that attention keeps of a row: queries, keys and values, turned and not, and its output; of
    latents their norms, and on the CPU each head's weights of all keys, unless its values are as wide as its queries.
    """
    model, (_, compute) = config.model, _sizes(config)
    inner, heads, gated = model.attention_width, model.num_heads, 3 * (model.attention_gate != "none")
    if model.kv_rank:
        plain, turning, value = model.latent_widths
        norms = _kept_by_norm(config, model.kv_rank) + _kept_by_norm(config, model.q_rank)
        weights = 4 * config.data.seq_len * (config.train.device == "cpu" and value != plain + turning)
        return norms + heads * (weights + compute * (3 * plain + 2 * turning + (3 + gated) * value))
    keys = inner * (model.num_kv_heads or heads) // heads
    numbers = (3 + gated) * inner + 3 * keys
    numbers += 2 * inner if keys < inner else 0  # keys and values of every head
    if routed and model.attention_experts:
        of_heads = 4 * inner + model.k * (2 * heads * model.d_model + 3 * inner)  # each pair's rows on both sides
        numbers = 10 * inner if model.attention_form == "moa" else of_heads
    return compute * numbers


def _numbers_of_scan(config: RunConfig, kind: str) -> int:
    """Return the numbers that a mixer with a state keeps of a row, counted off what autograd keeps: arrays of what is
    convolved and of what heads read, scores within a chunk, and the state of each chunk.
    """
    heads, key_heads, key, value = config.model.state_shape
    chunk = min(CHUNK, config.data.seq_len)
    numbers = 12 * key_heads * key + heads * (4 * key + 14 * value + 2 * key * value // chunk + 3 * chunk)
    more = {"gated_delta": 3 * chunk, "kimi_delta": 3 * chunk * key + 12 * key, "mamba2": 0}
    return numbers + heads * more[kind]


def _kept_by_routers(config: RunConfig) -> int:
    """Return the bytes that the routers of a block keep of a row."""
    model = config.model
    experts = model.num_experts + model.attention_experts * len(attention_sites(model, 0))
    return SCORES * _sizes(config)[0] * experts


def _kept_by_norm(config: RunConfig, width: int | None = None) -> int:
    """Return the bytes that a norm, of the residual stream or of another width, keeps of a row: what goes in and what
    comes out, and on the CPU, where it is no operator of its own, what is between.
    """
    size, compute = _sizes(config)
    return (config.model.d_model if width is None else width) * (
        (size if config.train.device == "cuda" else 2 * size) + compute
    )


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
