"""What comes before a run: its model, whether it can be trained at all, and for how many steps.

The machine that launches runs need not be one that trains them: :func:`check` and :func:`meta_model` allocate no
weights, and the latter needs no device.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypedDict

import torch

from rlroute.config import DataConfig, Order, RunConfig
from rlroute.errors import ConfigError, DataError, RlrouteError
from rlroute.kernels import choose_backend, resolve_backend
from rlroute.machine import keep_freed_memory
from rlroute.model import ModelShape, Transformer
from rlroute.model.accounting import Costs, costs, is_matrix, is_router
from rlroute.model.compiling import check_compiler
from rlroute.model.moe import HERE, Placement
from rlroute.model.parts import freeze
from rlroute.model.recompute import set_recompute
from rlroute.model.transformer import router_shapes
from rlroute.records import RunFolder, state
from rlroute.registry import make_router
from rlroute.routing import Router, RouterShape
from rlroute.schema import MadeFrom
from rlroute.sites import families, sites
from rlroute.training.batches import Batch, eval_batches, sample_batch
from rlroute.training.data import Corpus, corpus_of
from rlroute.training.determinism import check_workspace
from rlroute.training.group import ALONE, Group
from rlroute.training.manifest import own_checkpoints
from rlroute.training.memory import check_memory
from rlroute.values import differing


def set_up(config: RunConfig) -> None:
    """Give this process its threads, and let it keep the memory that it frees."""
    torch.set_num_threads(config.train.threads)
    keep_freed_memory()


def build_model(config: RunConfig, corpus: Corpus, seed: int, group: Group = ALONE) -> Transformer:
    """Return a run's model at its initial weights, on its device, with the experts that this process of a group holds.

    Raises:
        ConfigError: the router does not fit, or the device or the engine is not here.
    """
    _find_device(config)
    check_shards(config, group.placement.shards)
    model = Transformer(config.model, _shape(config, corpus, seed, group.placement), _router_maker(config))
    model.loss_chunk, model.packed = config.train.loss_chunk, config.data.packed
    set_recompute(model, config.train.recompute)
    freeze(model, config.train)
    model.to(config.train.device, torch.float64 if config.train.dtype == "float64" else torch.float32)
    if config.train.param_dtype == "bfloat16":
        for name, parameter in model.named_parameters():
            if is_matrix(name, parameter) and not is_router(name):  # vectors are few, and matter
                parameter.data = parameter.data.bfloat16()
    return model


def meta_model(config: RunConfig, corpus: Corpus, seed: int = 0, placement: Placement = HERE) -> Transformer:
    """Return a run's model on PyTorch's meta device, without weights.

    It refuses what the real one would, and its costs are those of the real one.

    Raises:
        ConfigError: the router does not fit.
    """
    with torch.device("meta"):
        model = Transformer(config.model, _shape(config, corpus, seed, placement), _router_maker(config))
    freeze(model, config.train)
    return model


def shapes(config: RunConfig, corpus: Corpus) -> list[RouterShape]:
    """Return what the routers of a run are built for, first site to last, whatever its routers."""
    return router_shapes(config.model, _shape(config, corpus, 0, HERE))


def expected_costs(config: RunConfig, corpus: Corpus, seed: int = 0) -> Costs:
    """Return what the model of a run costs, without building it.

    Raises:
        ConfigError: the router does not fit.
    """
    return costs(meta_model(config, corpus, seed), config.model, config.data.seq_len)


def _find_device(config: RunConfig) -> None:
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda': no CUDA device is there, legal is 'cpu'")
    if config.train.deterministic:
        check_workspace()
    if config.train.compile:
        check_compiler(config.train.device)
    resolve_backend(config.train.kernel, config.train.device)


def _shape(config: RunConfig, corpus: Corpus, seed: int, placement: Placement) -> ModelShape:
    return ModelShape(
        vocab_size=corpus.vocab_size,
        seq_len=config.data.seq_len,
        seed=seed,
        backend=choose_backend(config.train.kernel, config.train.device),
        token_counts_V=torch.from_numpy(corpus.token_counts_V),
        placement=placement,
    )


def _router_maker(config: RunConfig) -> Callable[[RouterShape], Router] | None:
    if config.router is None:
        return None
    unserved = {other.sites for other in config.others if not any(map(other.serves, sites(config.model)))}
    if unserved:
        raise ConfigError(f"sites {min(unserved)!r}: the model has {', '.join(families(sites(config.model)))}")
    return lambda shape: make_router(config.router_at(shape.site), shape)


def check(
    seeds_of: Mapping[RunConfig, Iterable[int]], workers: int = 1, expert_shards: int = 1, elsewhere: bool = False
) -> dict[DataConfig, Corpus]:
    """Find out whether runs can be trained, without writing anything or building a model: only their corpora are read,
    and returned.

    Bad input is refused. A defect in a router is none: it is found again in its run, which keeps the traceback.

    Args:
        seeds_of: the configurations of the runs, each with its seeds.
        workers: how many processes are to train each.
        expert_shards: into how many shards they cut the experts.
        elsewhere: on other machines, whose devices cannot be seen from here.

    Raises:
        ConfigError, DataError: one cannot.
    """
    corpora: dict[DataConfig, Corpus] = {}
    if workers % expert_shards:
        raise ConfigError(f"{workers} workers with expert parallelism {expert_shards}: want a multiple of it")
    for config, seeds in seeds_of.items():
        check_shares(config, workers)
        check_shards(config, expert_shards)
        if not elsewhere:
            _find_device(config)
        if config.data not in corpora:
            corpora[config.data] = corpus_of(config.data)
        if not elsewhere:
            check_memory(config, corpora[config.data].vocab_size, expert_shards)
        validation_batches(config, corpora[config.data])
        first, *_ = seeds = tuple(seeds)
        for seed in seeds:
            with defects_left_to_the_run():
                model = meta_model(config, corpora[config.data], seed, Placement(expert_shards))
                if config.train.budget == "flops" and seed == first:  # all seeds cost the same
                    planned_steps(config, costs(model, config.model, config.data.seq_len))
    return corpora


@contextmanager
def defects_left_to_the_run() -> Iterator[None]:
    """Let a router with a defect pass: its own runs will say so, and the others go on."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, RlrouteError | KeyboardInterrupt):
            raise


def refuse_changed(folder: RunFolder, made: MadeFrom) -> None:
    """Refuse to go on with a run, or to hand it out, that was made from something else than now.

    A run that has neither ended nor left a checkpoint begins anew, and passes.

    Raises:
        ConfigError: the message names the part, what it was and is, and the way out; or the run does not say.
    """
    if not (folder.ended or state(folder.path) == "stopped early" or own_checkpoints(folder.path)):
        return
    way_out = f"use another store, or remove {folder.path}"
    if (then := folder.made_from) is None:
        raise ConfigError(f"run {folder.id} does not say from which code and data it was made; {way_out}")
    if changed := next(differing(made, then), None):
        part, now, was = changed
        what, field = _said(part)
        raise ConfigError(f"run {folder.id} was made {what}: its {field} was {was}, now it is {now}; {way_out}")


def _said(part: str) -> tuple[str, str]:
    """Return what a part of ``made_from`` is, and the name of its field."""
    head, *names = part.split("/")
    field = names[-1] if names else head
    if head == "routers":
        return f"by another router {names[0]}" if len(names) > 1 else "by another router", field
    what = {
        "core": "by other sources of rlroute",
        "reads": "from another file that its router reads",
        "data": "from another corpus",
        "tokenizer": "with another tokenizer",
    }
    return what.get(head, "from something else"), field


def refuse_other_ranks(group: Group, made: MadeFrom) -> None:
    """Refuse workers that train one run from different code or data.

    Raises:
        ConfigError: this worker's are not the first one's.
    """
    mine = int(hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12], 16)
    if group.agree(mine) != mine:
        raise ConfigError(
            f"worker {group.rank} of a run has other code or data than worker 0: want the same everywhere"
        )


def check_shares(config: RunConfig, workers: int) -> None:
    """Refuse a step that workers cannot share.

    Raises:
        ConfigError: its micro-batches are no multiple of them; or more, where balance is of the whole batch.
    """
    train = config.train
    if train.micro_batches % workers:
        raise ConfigError(f"train.micro_batches = {train.micro_batches}: must be a multiple of the {workers} workers")
    if train.balance_scope == "batch" and train.micro_batches != workers:
        raise ConfigError(
            f"train.balance_scope = 'batch' with train.micro_batches = {train.micro_batches}: "
            f"needs as many workers, not {workers}"
        )


def check_shards(config: RunConfig, expert_shards: int) -> None:
    """Refuse experts that cannot be cut into so many shards.

    Raises:
        ConfigError: evenly, or because rows would have to travel once more in backward.
    """
    Placement(expert_shards).held(config.model.num_experts)
    if config.train.recompute and expert_shards > 1:
        raise ConfigError(f"train.recompute = True with {expert_shards} expert shards: legal is False, or one shard")


class Cut(TypedDict):
    """How a step's batch is cut."""

    batch_size: int
    seq_len: int
    order: Order


def cut(config: RunConfig) -> Cut:
    """Return how a step's batch is cut, as arguments of :func:`~rlroute.training.batches.sample_batch`."""
    return Cut(batch_size=config.train.batch_size, seq_len=config.data.seq_len, order=config.data.order)


def validation_batches(config: RunConfig, corpus: Corpus) -> list[Batch]:
    """Return a run's fixed validation batches, each of a micro-batch's size.

    Raises:
        DataError: the corpus is too short for them, or for a step; or it is to be packed, and nothing opens a document.
    """
    if config.data.packed and not corpus.token_counts_V[-1]:
        spec, last = corpus.provenance["spec"], corpus.vocab_size - 1
        raise DataError(f"data.packed = True: token {last} opens no document of corpus {spec!r}, legal is False")
    sample_batch(corpus, seed=0, step=0, **cut(config))
    return eval_batches(corpus, num_tokens=config.data.eval_tokens, **_micro_batch(config))


def training_batches(config: RunConfig, corpus: Corpus) -> list[Batch]:
    """Return the training tokens that a run evaluates beside, cut in the same way; none unless it says so."""
    if not config.train.eval_train:
        return []
    return eval_batches(corpus, num_tokens=config.data.eval_tokens, part="train", **_micro_batch(config))


def _micro_batch(config: RunConfig) -> dict[str, Any]:
    return {"batch_size": config.train.batch_size // config.train.micro_batches, "seq_len": config.data.seq_len}


def planned_steps(config: RunConfig, costs: Costs, spent: int = 0, done: int = 0) -> int:
    """Return the number of optimizer steps: as configured, or under budget flops as many as the amount pays for.

    Args:
        config: of the run.
        costs: of its model.
        spent, done: the training FLOPs that so many steps took: those to come are expected to take as many. Before the
            first, every token is expected to run k experts.

    Raises:
        ConfigError: the amount does not pay for one evaluation interval, after which prefixes of runs are compared.
    """
    train = config.train
    if train.budget != "flops":
        return train.steps
    assert train.budget_amount is not None
    per_step = spent / done if done else flops_per_step(config, costs)
    steps = int(train.budget_amount / per_step + 1e-9)
    if steps < train.eval_every and not done:
        raise ConfigError(
            f"train.budget_amount = {train.budget_amount:.3g} FLOPs: "
            f"{train.eval_every} steps cost {per_step * train.eval_every:.3g}, and it must pay for "
            f"train.eval_every = {train.eval_every}"
        )
    return max(steps, done)


def flops_per_step(config: RunConfig, costs: Costs) -> int:
    """Return the training FLOPs of one optimizer step in which every token runs k experts."""
    tokens = config.train.batch_size * config.data.seq_len
    return costs.of_training(tokens, [config.model.k * tokens * costs.samples] * len(costs.pair_flops_L))
