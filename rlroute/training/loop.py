"""Train one run from its configuration to its summary, resuming from its checkpoint if there is one."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rlroute.choices import ChoiceLog
from rlroute.config import SCHEMA, RunConfig
from rlroute.execution import Keep
from rlroute.kernels import resolve_backend
from rlroute.learning import adapt
from rlroute.limits import checked_seed
from rlroute.model import Transformer
from rlroute.model.accounting import costs, fingerprints
from rlroute.model.checks import checked
from rlroute.model.compiling import set_compiled
from rlroute.model.moe import MoELayer
from rlroute.provenance import made_from, utc_now
from rlroute.reading import last_row
from rlroute.records import RunFolder
from rlroute.schema import Asked, MadeFrom, Measured, Summary
from rlroute.sink import OFF, Mode, Sink, open_sink, warn
from rlroute.training.ahead import Ahead, Diverged
from rlroute.training.audit import audit, claims
from rlroute.training.batches import Batch, next_link, sample_batch, tokens_sha256
from rlroute.training.checkpoint import end_checkpoints, load_checkpoint, save_checkpoint
from rlroute.training.data import Corpus, corpus_of
from rlroute.training.determinism import deterministic
from rlroute.training.evaluate import evaluate
from rlroute.training.group import ALONE, Group
from rlroute.training.memory import check_memory
from rlroute.training.optimizer import Optimizer
from rlroute.training.prefetch import Batches
from rlroute.training.prepare import (
    build_model,
    check_shares,
    cut,
    planned_steps,
    refuse_changed,
    refuse_other_ranks,
    set_up,
    training_batches,
    validation_batches,
)
from rlroute.training.progress import Progress
from rlroute.training.start import Moments, take_start
from rlroute.training.step import Device, StepResult, backward_batch, load_fractions, max_vio_L, rounded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def train(
    config: RunConfig,
    seed: int,
    store: Path,
    *,
    command: str | None = None,
    asked: Asked | None = None,
    on_step: Callable[[int], None] = lambda step: None,
    group: Group = ALONE,
    wandb: Mode = "off",
    keep: Keep = "weights",
    sources: Path | None = None,
) -> Summary:
    """Train a run to its end and return its summary; an ended run is returned as it is, an unfinished one goes on.

    The processes of a group all call this, and see the same store; rank 0 writes the records.

    Args:
        config: the run's configuration.
        seed: initial weights, data order and routing noise derive from it.
        store: the run store's folder.
        command: the command line behind this run, for its record.
        asked: with what it is to be trained, likewise.
        on_step: called with the number of steps done, after each.
        group: the processes that train this run together.
        wandb: where the rows go besides the records; whatever happens there, the records are the same.
        keep: what of its checkpoints stays once it has ended.
        sources: the store of the run that this one starts from, if it does; by default the same.

    Raises:
        ConfigError, DataError: bad input, before anything is written.
        StoreError, CheckpointError: the store cannot be used; nothing in it is lost.
    """
    seed = checked_seed(seed)
    folder = RunFolder(store, config, seed)
    corpus = corpus_of(config.data)
    made = made_from(config, corpus.provenance)
    refuse_changed(folder, made)
    refuse_other_ranks(group, made)
    if group.agree(folder.ended):
        return folder.read().summary
    set_up(config)
    check_shares(config, group.size)
    check_memory(config, corpus.vocab_size, group.placement.shards)
    run = _Run(config, seed, folder, corpus, made, command, group, wandb, asked, keep, sources)
    with folder.lock() if group.rank == 0 else nullcontext():
        if group.agree(folder.ended):  # by whoever held the lock before
            return folder.read().summary
        try:
            with deterministic(config.train.deterministic, config.train.device):
                return cast(Summary, run.train(on_step))
        finally:
            run.batches.close()
            run.sink.close()


class _Run:
    """The parts of one run and the order in which they work."""

    def __init__(
        self,
        config: RunConfig,
        seed: int,
        folder: RunFolder,
        corpus: Corpus,
        made: MadeFrom,
        command: str | None = None,
        group: Group = ALONE,
        wandb: Mode = "off",
        asked: Asked | None = None,
        keep: Keep = "weights",
        sources: Path | None = None,
    ) -> None:
        self.config, self.seed, self.folder, self.corpus = config, seed, folder, corpus
        self.command, self.asked = command, asked
        self.made, self.group, self.wandb, self.keep = made, group, wandb, keep
        self.sink: Sink = OFF  # opened with the records
        self.cut = cut(config)
        self.batches = Batches(
            lambda step: sample_batch(corpus, seed=seed, step=step, **self.cut), config.train.prefetch
        )
        self.step_tokens = config.train.batch_size * config.data.seq_len
        if config.train.device == "cuda":  # a process may train run after run
            torch.cuda.reset_peak_memory_stats()
        self.eval_batches = validation_batches(config, corpus)  # a corpus that is too short is found before any work
        self.train_batches = training_batches(config, corpus)
        self.model = build_model(config, corpus, seed, group)
        carried: Moments = {}
        if config.start is not None:
            carried = take_start(self.model, config, corpus, seed, sources or folder.path.parent, group)
        if config.train.compile:
            torch.compiler.reset()  # what runs before this one in the same process were compiled to
            set_compiled(self.model, True)
        self.identity = fingerprints(self.model, config.model, group.whole)
        self.costs = costs(self.model, config.model, config.data.seq_len)
        self.optimizer = Optimizer(self.model, config.train, group)
        if carried:
            self.optimizer.carry(carried)
        self.device = Device(config.train.device, DTYPES[config.train.dtype])
        self.steps = planned_steps(config, self.costs)
        self.choices = ChoiceLog(folder.path)
        self.progress = Progress()
        self.ahead = Ahead(self.costs, self.step_tokens)
        # The steps that a budget of FLOPs pays for hang on the pairs that ran, and choices are written at every step.
        self.looks_always = config.train.budget == "flops" or config.train.record_choices
        self.saved: int | None = None  # the step of the newest checkpoint
        self.logged = 0.0  # seconds trained when the last row was written
        self.unseen = {"train", "eval"}  # in which this process has not yet looked at the routers' decisions

    def train(self, on_step: Callable[[int], None]) -> dict[str, Any]:
        config = self.config.train
        row = self._resume()
        try:
            while (used := self._budget_used()) < 1.0:
                self._advance(used)
                step = self.progress.step
                on_step(step)
                final = self._budget_used() >= 1.0
                row = self._evaluate(final) if final or step % config.eval_every == 0 else None
                if step % config.checkpoint_every == 0:
                    self._checkpoint()
            if row is None:  # resumed from a checkpoint of the last step whose evaluation was not written
                row = self._evaluate(final=True)
            if self.saved != self.progress.step:
                self._checkpoint()
            summary = self._summary("finished", row, None) | {"measured": self._audit()}
        except Diverged as stop:
            stopped = {"step": self.progress.step, "what": stop.what}
            summary = self._summary("diverged", None, stopped) | {"measured": None}  # of no use where numbers are not
        if self.group.rank == 0:
            self.folder.finish(summary)
            end_checkpoints(self.folder.path, self.keep)
            self.sink.close(summary)
        return summary

    def _budget_used(self) -> float:
        if self.config.train.budget == "time":
            amount = self.config.train.budget_amount
            assert amount is not None
            return max(self.progress.seconds["train"] / amount, self.progress.step / self.steps)
        return self.progress.step / self.steps

    def _advance(self, used: float) -> None:
        """Take a step, and look at what was taken if it is time to."""
        try:
            result, norms = self._step(used)
        except Exception:
            self.ahead.look(self.progress)  # a run that had diverged before may raise anything
            raise
        if self.progress.step % self.config.train.log_every == 0:
            self._log(result, norms)
        elif self.looks_always:
            self._look()

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Book the time of the block as spent on training."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if self.config.train.budget == "time":  # which all ranks read off one clock
            seconds = self.group.agree(seconds)
        self.progress.seconds["train"] += seconds

    def _step(self, used: float) -> tuple[StepResult, dict[str, float | Tensor]]:
        """Take a step without waiting for the device."""
        config, step = self.config.train, self.progress.step
        with self._training():
            batch = self.batches.take(step, self.steps)
            with self._first("train"):
                result = backward_batch(
                    self.model,
                    batch,
                    self.device,
                    seed=self.seed,
                    step=step,
                    micro_batches=config.micro_batches,
                    group=self.group,
                    scope=config.balance_scope,
                    progress=used,
                    on_choices=partial(self.choices.write, step) if config.record_choices else None,
                )
            norms = self.optimizer.step(step, used)
            adapt(self.model.routers, result.sums_L, used)
            self.ahead.take(self.progress, next_link(self.progress.chain, batch), result, norms)
        return result, norms

    def _look(self, row: Any = None) -> Any:
        """Look at the steps that were taken, if there are any, and return the numbers of a row."""
        if self.ahead.taken:
            with self._training():
                row = self.ahead.look(self.progress, row)
            self.steps = planned_steps(self.config, self.costs, self.progress.flops, self.progress.step)
        return row

    def _log(self, result: StepResult, norms: dict[str, float | Tensor]) -> None:
        measured: dict[str, Any] = {"loss": result.loss, "terms": result.terms, "weights": result.weights, **norms}
        measured |= {"max_vio_L": max_vio_L(result.demand_L), **result.per_token()}
        traffic = self.group.traffic() if result.sums_L else None
        if traffic is not None:
            by_device_L = _by_device(self.model, result.demand_L, self.group.placement.shards)
            measured |= {"traffic": traffic | {"device_max_vio_L": max_vio_L(by_device_L)}}
        measured, load_LE = self._look((measured, load_fractions(result.demand_L)))
        if traffic is not None and "seconds" in traffic:
            share = traffic["seconds"] / (self.progress.seconds["train"] - self.logged)
            measured["traffic"]["share"] = round(share, 4)
        self.logged = self.progress.seconds["train"]
        self._append("metrics", self._row("train") | measured)
        self._append("loads", {"step": self.progress.step, "load_LE": rounded(load_LE)})

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self.group.rank == 0:
            self.folder.append(name, row)
            self.sink.log(name, row)

    def _row(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "step": self.progress.step,
            "tokens": self.progress.step * self.step_tokens,
            "seconds": round(self.progress.seconds["train"], 3),
        }

    def _evaluate(self, final: bool) -> dict[str, Any]:
        self._look()
        start = time.perf_counter()
        with self.group.uncounted(), self._first("eval"):
            row = self._losses(self.eval_batches, final=final)
            if self.train_batches:
                seen = self._losses(self.train_batches, final=False)
                row["training"] = {name: seen[name] for name in ("loss", "bits_per_byte")}
        self.progress.seconds["eval"] += time.perf_counter() - start
        if any(part["loss"] is None for part in (row, row["sampled"] or row, row.get("training", row))):
            raise Diverged("the validation loss is not finite")
        row = self._row("eval") | row | {"chain": self.progress.chain}
        self._append("metrics", row)
        return row

    def _losses(self, batches: Sequence[Batch], final: bool) -> dict[str, Any]:
        keys: dict[str, Any] = {"seed": self.seed, "step": self.progress.step, "progress": self._budget_used()}
        bytes_V = self.corpus.token_bytes_V
        return evaluate(self.model, batches, bytes_V, self.device, final=final, group=self.group, **keys)

    def _first(self, kind: str) -> AbstractContextManager[None]:
        """Return a context in which the decisions of this process's first step, or evaluation, are checked."""
        first = kind in self.unseen
        self.unseen.discard(kind)
        begins = kind == "train" and not self.progress.step  # what training has made of a model may not be finite
        return checked(self.model.routers, finite=begins) if first else nullcontext()

    def _audit(self) -> Measured:
        """Measure the trained model."""
        config, step = self.config.train, max(0, self.progress.step - 1)
        keys: dict[str, Any] = {"seed": self.seed, "step": step, "progress": self._budget_used()}
        if config.balance_scope == "batch":
            keys["sum_over_scope"] = self.group.sum_over_scope
        sequences = config.batch_size // config.micro_batches
        with self.group.uncounted():
            return audit(
                self.model, self.costs, self.eval_batches, sequences, self.device, agree=self.group.agree, **keys
            )

    def _checkpoint(self) -> None:
        self._look()
        parts = (self.model, self.optimizer, self.progress)
        save_checkpoint(self.folder.path, *parts, self.folder.id, self.group, self.keep)
        self.saved = self.progress.step

    def _resume(self) -> dict[str, Any] | None:
        """Take the run up where its checkpoint left it; return that step's evaluation if it was made."""
        with self.group.together():
            found, damaged = load_checkpoint(self.folder.path, self.model, self.optimizer, self.folder.id, self.group)
            if found is not None:
                self.progress = found
                self.steps = planned_steps(self.config, self.costs, self.progress.flops, self.progress.step)
                self.saved = self.progress.step
                self.logged = self.progress.seconds["train"]
        with self.group.together():
            if self.group.rank == 0:
                self._open_records(new=found is None, damaged=damaged)
        row = last_row(self.folder.path)
        return row if row and row["kind"] == "eval" and row["step"] == self.progress.step else None

    def _open_records(self, new: bool, damaged: Sequence[str]) -> None:
        backend = resolve_backend(self.config.train.kernel, self.config.train.device)
        parallel = {"workers": self.group.size, "expert_parallel": self.group.placement.shards}
        if new:
            made = dict(self.made)
            self.folder.describe(self.config, self.seed, backend, self.command, parallel, made, self.asked)
        else:
            notes = [f"damaged checkpoint {what}" for what in damaged]
            self.folder.note_environment(self.config, backend, parallel, notes)
        for what in damaged:
            warn(self.folder.id, f"goes on from step {self.progress.step}, a newer checkpoint is damaged: {what}")
        self.folder.rewind(self.progress.step)
        self.sink = open_sink(self.wandb, self.folder.path)

    def _costs(self, final: dict[str, Any] | None, tokens: int) -> dict[str, int]:
        """Return parameters, and FLOPs by the pairs that ran: greedy in the last evaluation."""
        pairs_L = final["pairs_L"] if final else [float(self.config.model.k)] * len(self.model.routers)
        return self.costs.recorded(pairs_L, self.progress.flops, self.progress.forward, tokens)

    def _summary(self, status: str, final: dict[str, Any] | None, diverged: dict[str, Any] | None) -> dict[str, Any]:
        config, progress = self.config, self.progress
        tokens = progress.step * self.step_tokens
        return {
            "schema": SCHEMA,
            "id": self.folder.id,
            "router": config.router_name,
            "seed": self.seed,
            "config_hash": config.content_hash(),
            "status": status,
            "diverged": diverged,
            "steps": progress.step,
            "tokens": tokens,
            "final": final,
            "fingerprint": self.identity,
            "batches": {"chain": progress.chain, "steps": progress.step},
            "eval_tokens_sha256": tokens_sha256(self.eval_batches),
            "data": self.corpus.provenance,
            "model": self._costs(final, tokens),
            **claims(self.model.routers, config.model.gate_form),
            "budget": {
                "kind": config.train.budget,
                "amount": config.train.budget_amount or self.steps * self.step_tokens,
            },
            "seconds": {name: round(value, 3) for name, value in progress.seconds.items()},
            "tokens_per_second": round(tokens / progress.seconds["train"], 1) if progress.seconds["train"] else None,
            "ended": utc_now(),
            "peak_memory": torch.cuda.max_memory_allocated() if config.train.device == "cuda" else None,
        }


def _by_device(model: Transformer, demand_L: Sequence[Tensor], shards: int) -> list[Tensor]:
    """Return the pairs of real experts on each device, of each site whose experts are cut into shards."""
    return [
        demand_E[: site.router.shape.num_real_experts].view(shards, -1).sum(1)
        for site, demand_E in zip(model.routed, demand_L, strict=True)
        if isinstance(site, MoELayer)
    ]
