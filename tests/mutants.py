"""Small faults of the core that some test must notice: ``make mutants`` plants each in turn and runs the tests named.

A mutant replaces one text by another. A test that fails has killed it; where all pass it has lived, and either the
tests or the list is to be mended. Each of two workers has a copy of the tree: the tree itself is never touched.

Longer than most: two thirds of it are the list.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

from tests import ROOT

COPIED = ("docs", "rlroute", "agents", "baselines", "envs", "experiments", "tests", "pyproject.toml")
WORKERS = 2
LONGEST = 300
"""Seconds after which a run of tests is given up."""
KILLED, LIVED = "killed", "LIVED"


@dataclass(frozen=True)
class Mutant:
    """In ``file``, ``old`` (which occurs once) becomes ``new``: one of ``tests``, parted by spaces, must fail."""

    what: str
    file: str
    old: str
    new: str
    tests: str

    def planted(self, root: Path) -> str:
        """Return the text of the file with the fault.

        Raises:
            ValueError: the old text does not occur exactly once.
        """
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.what}: {self.file} holds {text.count(self.old)} times, want once: {self.old}")
        return text.replace(self.old, self.new)


def faults(file: str, tests: str, *texts: tuple[str, str, str]) -> list[Mutant]:
    """Return the mutants of a file that the same tests must notice, from (what, old, new)."""
    return [Mutant(what, file, old, new, tests) for what, old, new in texts]


MUTANTS = [
    *faults(
        "rlroute/model/upcycling.py",
        "tests/test_upcycling.py",
        ("what comes out of a piece counts once", "out_EDW *= out_DF.shape[1] // out_EDW.shape[2]", "out_EDW *= 1"),
        ("pieces are scored apart", "rows_EX.copy_(rows_EX[: len(rows_EX) // pieces].repeat(pieces, 1))", "pass"),
        ("drawn units have no mean", "matrix_WX[units] = new + old.mean()", "matrix_WX[units] = new"),
    ),
    *faults(
        "rlroute/training/start.py",
        "tests/test_start.py tests/test_upcycling.py",
        ("weights of another tokenizer are taken", "if then != now:", "if False:"),
        ("every process holds the first experts", "value[held.start : held.stop]", "value[: len(held)]"),
        ("fresh routers are taken", 'start.router == "kept" or not is_router(name)', "True"),
    ),
    *faults(
        "rlroute/training/checkpoint.py",
        "tests/test_start.py",
        ("a start that has changed is taken", "if found.sha256(carried) != start.sha256:", "if False:"),
    ),
    *faults(
        "rlroute/training/optimizer.py",
        "tests/test_upcycling.py",
        ("updates before the run are forgotten", "steps + self.before.get(name, 0)", "steps"),
    ),
    *faults(
        "rlroute/model/transformer.py",
        "tests/test_transformer.py",
        (
            "no residual around the feed-forward layer",
            "return x_BSD + y_TD.view_as(x_BSD), made",
            "return y_TD.view_as(x_BSD), made",
        ),
        ("no norm before attention", "x_BSD + mixer(norm(x_BSD), mask_BSS)", "x_BSD + mixer(x_BSD, mask_BSS)"),
        ("no norm before the logits", "self.unembed(self.norm(x_BSD))", "self.unembed(x_BSD)"),
        (
            "embeddings start at 1",
            "seeding.init_normal(self.embed.weight, config.d_model**-0.5,",
            "seeding.init_normal(self.embed.weight, 1.0,",
        ),
    ),
    *faults(
        "rlroute/variants.py",
        "tests/test_transformer.py",
        ("no layer is dense", "range(self.num_dense_layers + self.moe_every - 1, ", "range(self.moe_every - 1, "),
    ),
    *faults(
        "rlroute/variants.py",
        "tests/test_layer_variants.py",
        ("every block after the dense ones has experts", "self.num_layers, self.moe_every)", "self.num_layers)"),
    ),
    *faults(
        "rlroute/model/transformer.py",
        "tests/test_seam.py tests/test_sites.py",
        ("a site sees no earlier decision", "context.at(shape, {**context.earlier, **made})", "context.at(shape, {})"),
    ),
    *faults(
        "rlroute/model/attention.py",
        "tests/test_transformer.py",
        (
            "rotary positions are the identity",
            "return torch.cat((a * cos_SH - b * sin_SH, a * sin_SH + b * cos_SH), dim=-1)",
            "return x_BNSH",
        ),
        ("rotary positions turn no plane", "a * sin_SH + b * cos_SH", "b * cos_SH - a * sin_SH"),
        ("rotary angles fall half as fast", "(-torch.arange(half) / half)", "(-torch.arange(half) / (2 * half))"),
        (
            "attention sees the future",
            "k_BNSH, v_BNSH, is_causal=True)",
            "k_BNSH, v_BNSH)",
        ),
        (
            "attention's output starts as large as its input",
            "inner**-0.5 / (2 * config.num_layers) ** 0.5",
            "inner**-0.5",
        ),
    ),
    *faults(
        "rlroute/model/attention.py",
        "tests/test_attention_experts.py",
        (
            "all slots of a token share one query",
            "return torch.where(decision.used_R, places_R,",
            "return torch.where(~decision.used_R, places_R,",
        ),
        ("every slot has its own keys", "part_BNSH.repeat(1, slots, 1, 1)", "part_BNSH.repeat_interleave(slots, 1)"),
    ),
    *faults(
        "rlroute/model/latent.py",
        "tests/test_transformer.py",
        ("the latent is not normed", "self.kv_up(_wide_norm(self.kv_norm, latent_BSR))", "self.kv_up(latent_BSR)"),
        ("the shared key does not turn", "self.rotary(turning_BSH[:, None])", "turning_BSH[:, None]"),
    ),
    *faults(
        "rlroute/model/scan.py",
        "tests/test_mixers.py",
        ("a state does not decay", "passed_BNCG.exp() * before_BC", "torch.ones_like(passed_BNCG) * before_BC"),
        ("a state goes on into the next document", "passed_BNCG.exp() * before_BC", "passed_BNCG.exp()"),
        ("a value is taken in whole", "beta_BNC[..., None] * (v_BNCV", "(v_BNCV"),
        ("a convolution sees another document", "* seen_BS[..., None] * weight_IW", "* weight_IW"),
    ),
    *faults(
        "rlroute/model/delta.py",
        "tests/test_mixers.py",
        ("queries are as long as keys", "self._unit(q_BSI) * self.key**-0.5", "self._unit(q_BSI)"),
        (
            "heads of keys come in turn",
            "x_BNSK.repeat_interleave(self.heads // self.key_heads, 1)",
            "x_BNSK.repeat(1, self.heads // self.key_heads, 1, 1)",
        ),
    ),
    *faults(
        "rlroute/model/mamba.py",
        "tests/test_mixers.py",
        ("values are taken in as they are", "step_BNS1 * v_BNSV", "v_BNSV"),
        ("nothing goes past the state", "read_BNSV + self.past_N[:, None, None] * v_BNSV", "read_BNSV"),
    ),
    *faults(
        "rlroute/model/switchhead.py",
        "tests/test_switchhead.py",
        ("heads read each other's values", "v_NTH.view(heads,", "v_NTH.flip(0).view(heads,"),
        ("what heads write is averaged", "made, x_TD).sum(0)", "made, x_TD).mean(0)"),
        ("a head's experts start alike", 'f"layers.{shape.site}.experts", expert)', 'f"layers.{shape.site}.experts")'),
    ),
    *faults(
        "rlroute/model/moe.py",
        "tests/test_transformer.py",
        (
            "experts write as large as they read",
            "1 / math.sqrt(2 * config.num_layers * d_expert)",
            "1 / math.sqrt(d_expert)",
        ),
        ("all experts start alike", 'f"layers.{layer}.{key}.in", expert)', 'f"layers.{layer}.{key}.in", 0)'),
    ),
    *faults(
        "rlroute/model/moe.py",
        "tests/test_step.py",
        (
            "routers run in bfloat16",
            "torch.autocast(device, torch.bfloat16, enabled=low)",
            "torch.autocast(device, torch.bfloat16, enabled=True)",
        ),
    ),
    *faults(
        "rlroute/model/moe.py",
        "tests/test_transformer.py",
        ("shared experts are left out", "out_TD if shared_TD is None else out_TD + shared_TD", "out_TD"),
    ),
    *faults(
        "rlroute/model/moe.py",
        "tests/test_seam.py",
        (
            "the token's own input is left out",
            "if decision.self_T is not None:\n        out_TD",
            "if decision.self_T is not None and False:\n        out_TD",
        ),
        (
            "gates of shared experts are ignored",
            "if gates_TS is not None:\n            act",
            "if gates_TS is None and False:\n            act",
        ),
        (
            "gates of 0 count in unit gates",
            "weighs_R = (gates_R.detach() != 0)",
            "weighs_R = (gates_R.detach() == gates_R)",
        ),
    ),
    *faults(
        "rlroute/model/moe.py",
        "tests/test_layer_variants.py",
        (
            "a gate of shared experts is none",
            "if self.shared_gate is not None:",
            "if self.shared_gate is None and False:",
        ),
        ("activations are dropped in evaluation", "if dropout and context.training:", "if dropout:"),
        ("experts of a token drop alike", "for row_T in rows), decision.expert_ids_R))", "for row_T in rows),))"),
    ),
    *faults(
        "rlroute/kernels/form.py",
        "tests/test_layer_variants.py",
        (
            "gates at the input weigh the output's bias too",
            "torch.ones_like(gates_R) if self.gate_at_input else gates_R",
            "gates_R",
        ),
        ("what is kept is not scaled", "kept_NF.to(dtype) * self.scale", "kept_NF.to(dtype)"),
    ),
    *faults(
        "rlroute/kernels/cpu.py",
        "tests/test_kernels.py",
        ("the gradient of a gate leaves its output's bias out", "dgates += (dout @", "dgates += 0 * (dout @"),
        ("a clamp passes its gradient on", "dinner_CF.masked_fill_(gate_CF > CLAMP, 0)", "pass"),
    ),
    *faults(
        "rlroute/kernels/operator.py",
        "tests/test_operator.py",
        ("a bound is no bound of shapes", "min(max_pairs, len(gates_R))", "len(gates_R)"),
        ("what backward reads is kept at all times", "rows if save else 0", "rows"),
    ),
    *faults(
        "rlroute/model/capacity.py",
        "tests/test_capacity.py",
        ("capacity is rounded down", "torch.ceil(pairs_per_row", "torch.floor(pairs_per_row"),
        (
            "first choices do not come first",
            ".view(decision.num_tokens, decision.k).t().reshape(-1)",
            ".view(decision.num_tokens, decision.k).reshape(-1)",
        ),
        ("an expert runs one pair too many", "< capacity_T[bin_R])", "<= capacity_T[bin_R])"),
        ("routing samples compete", "return sample_T * groups +", "return 0 * sample_T +"),
        ("small gates come first", "argsort(descending=True, stable=True)", "argsort(descending=False, stable=True)"),
        ("tiles are filled in evaluation too", "if config.round_to and context.training:", "if config.round_to:"),
        ("a half full tile goes", "torch.where(2 * beyond < size", "torch.where(2 * beyond <= size"),
        ("the bound lets one more run", "runs_R.cumsum(0) <= most", "runs_R.cumsum(0) <= most + 1"),
    ),
    *faults(
        "rlroute/model/accounting.py",
        "tests/test_flops.py",
        ("attention costs nothing", "return part.mixing_flops(seq_len) if", "return 0 if"),
        ("experts cost nothing", "self.fixed_flops + round(flops)", "self.fixed_flops"),
        ("embeddings are multiplied", "(0 if config.tie_embeddings else model.embed.weight.numel())", "0"),
        (
            "routers cost nothing",
            "for part in block.parts)\n        + sum(work.greedy for work in work_L),",
            "for part in block.parts),",
        ),
    ),
    *faults(
        "rlroute/model/attention.py",
        "tests/test_flops.py",
        ("attention sees every key", "2 * (seq_len + 1) * self.out.in_features", "4 * seq_len * self.out.in_features"),
    ),
    *faults(
        "rlroute/model/accounting.py",
        "tests/test_budget.py",
        ("training costs a forward", "weights * (1 + passes + trains)", "weights"),
        (
            "pairs cost nothing in training",
            "return pairs + tokens * self.samples * self.step",
            "return tokens * self.samples * self.step",
        ),
    ),
    *faults(
        "rlroute/model/accounting.py",
        "tests/test_audit.py",
        ("no gradient costs as much as one", "fixed += work.training if", "fixed += 3 * work.forward if"),
        ("adapt costs nothing", "return sum(work.adapt for work in self.work_L)", "return 0"),
        ("a bandit's numbers are in no total", "total_parameters=total + buffers,", "total_parameters=total,"),
    ),
    *faults(
        "rlroute/model/accounting.py",
        "tests/test_parts.py",
        ("what is frozen costs what trains does", "(1 + passes + trains)", "(1 + 2 * passes)"),
        ("a gradient passes everywhere", "passes = model.embed.weight.requires_grad", "passes = True"),
        ("gates are taught for nothing", 'passes |= learns and "gate" in site', 'passes |= False and "gate" in site'),
    ),
    *faults(
        "rlroute/model/parts.py",
        "tests/test_parts.py",
        ("a frozen router adapts", "router.freeze()", "router.requires_grad_(False)"),
        ("non-moe is moe", 'outside = config.parts == "non-moe"', "outside = False"),
    ),
    *faults(
        "rlroute/model/work.py",
        "tests/test_audit.py",
        ("a product with a vector costs nothing", 'name in ("mv", "dot", "vdot")', 'name in ("dot", "vdot")'),
        ("elementwise products cost nothing", "round(products + elementwise * elements)", "round(products)"),
        ("what is observed costs nothing", "forward:\n        sums", "Counter():\n        sums"),
    ),
    *faults(
        "rlroute/training/regret.py",
        "tests/test_regret.py",
        ("the last route is the best", "self.best_N = torch.minimum(self.best_N, loss_N)", "self.best_N = loss_N"),
        ("exchanges stop after one", "active_N = active_N & (still_N < self.sizes_N)", "break"),
    ),
    *faults(
        "rlroute/training/routes.py",
        "tests/test_regret.py",
        ("gates are as published", "apply_gate_form(answer, self.layer.config.gate_form)", "answer"),
        ("free experts are forced away", "torch.where(real_MK, order_ME", "torch.where(real_MK | ~real_MK, order_ME"),
    ),
    *faults(
        "experiments/comparison/multipliers.py",
        "tests/test_ladder.py",
        ("few seeds have no tails", "stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)", "1.96"),
        ("draws of seeds are alike", "np.array(ways) / seeds**seeds", "np.full(len(ways), 1 / len(ways))"),
        (
            "a multiplier is its inverse",
            "(reference.log_compute(between_PR) - entry",
            "(entry.log_compute(between_PR) - reference",
        ),
    ),
    *faults(
        "rlroute/training/audit.py",
        "tests/test_audit.py",
        ("gates are not compared", "> tolerance * scale_T", "> 1e9 * scale_T"),
        ("drops are not compared", "return torch.ne(*dropped).any(1)", "return torch.ne(*dropped).any(1) & False"),
        ("later tokens stay", "np.where(changes_BS, new_BS, tokens_BS)", "np.where(changes_BS, tokens_BS, tokens_BS)"),
        ("a change elsewhere is taken for one behind", "bool(agree(float(mixed)))", "bool(agree(0.0))"),
        (
            "training is measured without gradients",
            'as hooks, checked(self.model.routers), torch.set_grad_enabled(self.keys["explore"])',
            "as hooks, checked(self.model.routers), torch.set_grad_enabled(False)",
        ),
        ("routers are asked as of the end alone", "replace(context, **moment)", "context"),
    ),
    *faults(
        "rlroute/model/accounting.py",
        "tests/test_optimizer.py",
        ("no parameter is a router's", '".router." in name', '".rooter." in name'),
    ),
    *faults(
        "rlroute/metrics.py",
        "tests/test_metrics.py",
        (
            "MaxVio is 1 at balance",
            "load_E.max() / load_E.double().mean() - 1",
            "load_E.max() / load_E.double().mean()",
        ),
        (
            "the coefficient of variation is constant",
            "return load_E.double().std(correction=0) / load_E.double().mean()",
            "return torch.zeros(())",
        ),
        ("the load's entropy is constant", "if len(load_E) > 1 else", "if len(load_E) < 1 else"),
        (
            "the router's entropy is constant",
            "values_T = entropy_T(probs_TE) / math.log(max(probs_TE.shape[1], 2))",
            "values_T = torch.ones(len(probs_TE))",
        ),
        ("no expert is dead", "(load_E < share * load_E.double().mean())", "(load_E < 0)"),
        ("nothing is ever dropped", "(chosen - decision.load_E().sum())", "(chosen - chosen)"),
        ("unused slots are another token's", "columns = decision.num_experts + 1", "columns = decision.num_experts"),
        ("overlap counts unused slots", "(chosen_N[mine_R] & decision.used_R).sum()", "chosen_N[mine_R].sum()"),
    ),
    *faults(
        "rlroute/balance.py",
        "tests/test_balance.py",
        ("load is counted after drops", "decision.demand_E(context.mask_T).to(", "decision.load_E(context.mask_T).to("),
        (
            "probability mass has no gradient",
            "mass_E / mass_E.detach().sum()\n",
            "mass_E.detach() / mass_E.sum()\n",
        ),
    ),
    *faults(
        "rlroute/balance.py",
        "tests/test_metrics.py",
        ("sequences weigh alike, however short", "(loss_B * tokens_B).sum() / tokens_B.sum()", "loss_B.mean()"),
        ("an expert at its share is overloaded", "demand_E.sum().clamp(min=1) - 1,", "demand_E.sum().clamp(min=1),"),
        ("the z-loss is not squared", "logits_TE.logsumexp(1).square()", "logits_TE.logsumexp(1)"),
        ("the variance is of a sample", "values_E.var(correction=0)", "values_E.var()"),
    ),
    *faults(
        "rlroute/training/optimizer.py",
        "tests/test_optimizer.py",
        ("no weight decay", '"weight_decay": config.weight_decay', '"weight_decay": 0.0'),
        (
            "vectors decay",
            'if p not in matrices], "weight_decay": 0.0',
            'if p not in matrices], "weight_decay": config.weight_decay',
        ),
        (
            "routers decay",
            '{"params": self.router, "weight_decay": 0.0',
            '{"params": self.router, "weight_decay": config.weight_decay',
        ),
        ("router_lr_scale is ignored", '"scale": config.router_lr_scale', '"scale": 1.0'),
        ("the betas are 0.5", "betas=(0.9, 0.95)", "betas=(0.5, 0.5)"),
        (
            "routers are clipped at the model's limit",
            "self._clip(self.router, self.config.router_clip)",
            "self._clip(self.router, self.config.clip)",
        ),
        ("experts do not count in the norm", "self.group.sum_over_shards(get_total_norm(experts).square())", "0.0"),
        (
            "gradients are not clipped",
            "clip_grads_with_norm_(parameters, limit, norm)",
            "clip_grads_with_norm_(parameters, math.inf, norm)",
        ),
        ("warm-up starts at 0", "(step + 1) / config.warmup_steps", "step / config.warmup_steps"),
        ("the rate decays to 0", "decay = config.final_lr +", "decay = 0.0 +"),
        (
            "the rate decays by a quarter of a cosine",
            "math.cos(math.pi * min(1.0, progress))",
            "math.cos(math.pi / 2 * min(1.0, progress))",
        ),
    ),
    *faults(
        "rlroute/training/evaluate.py",
        "tests/test_evaluation.py",
        ("the greedy policy is sampled", "modes = [False, True]", "modes = [True, True]"),
        ("drop rate is always 0", "(used_L - kept_L).sum()", "(ran_L - ran_L).sum()"),
        ("bits are per token", "nats / math.log(2) / text_bytes", "nats / math.log(2) / tokens"),
        ("the last batch stands for all", "sums_L7[site] += _sums(decision)", "sums_L7[site] = _sums(decision)"),
        ("load is counted after drops", "+= decision.demand_E()", "+= decision.load_E()"),
        (
            "entropies of batches weigh alike",
            "tokens * metrics.router_entropy(probs_TE).double()",
            "metrics.router_entropy(probs_TE).double()",
        ),
    ),
    *faults(
        "rlroute/training/step.py",
        "tests/test_step.py",
        ("bfloat16 is float32", "enabled=self.dtype == torch.bfloat16", "enabled=False"),
        ("the last micro-batch stands for all", "sums[name] + value if name in sums else value", "value"),
    ),
    *faults(
        "rlroute/learning.py",
        "tests/test_step.py tests/test_seam.py",
        ("terms are logged alone", "total = loss + weighted(terms_L)", "total = loss"),
        ("terms of weight 0 are added", "if isinstance(term.weight, Tensor) or term.weight)", "if term is not None)"),
        ("weights are ignored", "sum((term.weight * term.value for", "sum((term.value for"),
        ("gates keep no gradient", "decision.gates_R.retain_grad()", "decision.gates_R.detach()"),
        (
            "what is counted can be claimed",
            "if taken := sorted(counted.keys() & observed.keys()):",
            "if taken := sorted(set()):",
        ),
        (
            "all sites learn by the first one's keys",
            "feedback.context.at(router.shape, dict(earlier))",
            "feedback.context",
        ),
        ("tokens without an expert are not counted", "((ran_T == 0) & mask_T).sum()", "((ran_T < 0) & mask_T).sum()"),
    ),
    *faults(
        "rlroute/routing.py",
        "tests/test_routing.py",
        (
            "all sites draw the same noise",
            "seeding.derive_key(self.seed, name, self.site, self.step)",
            "seeding.derive_key(self.seed, name, self.step)",
        ),
    ),
    *faults(
        "rlroute/routing.py",
        "tests/test_seam.py",
        ("what is never chosen is chosen", "ids_TK.masked_fill(left_over_TK, scores_TE.shape[1])", "ids_TK"),
        ("forced choices are ignored", "self.choices.get(self.site, ids_TK)", "ids_TK"),
    ),
    *faults(
        "rlroute/feedback.py",
        "tests/test_seam.py",
        ("only this site's sums are summed", "torch.stack([peer[name] for peer in self.peers]).sum(0)", "self[name]"),
    ),
    *faults(
        "rlroute/kernels/plan.py",
        "tests/test_engines.py",
        ("idle pairs take a running one's row", "runs_R.cumsum(0), idle_R) - 1", "runs_R.cumsum(0), idle_R) - 2"),
    ),
    *faults(
        "rlroute/training/prepare.py",
        "tests/test_budget.py",
        ("budgets are planned once", "per_step = spent / done if done else", "per_step = spent / done if False else"),
    ),
    *faults(
        "rlroute/choices.py",
        "tests/test_replay.py",
        ("steps are written over one another", "file.seek(step * row.nbytes)", "file.seek(0)"),
    ),
    *faults(
        "rlroute/sampling.py",
        "tests/test_sampling.py",
        ("the worst experts are chosen", "descending=True", "descending=False"),
        ("draws are with replacement", 'left_TE = left_TE.scatter(1, ids_T1, float("-inf"))', "left_TE = logits_TE"),
    ),
    *faults(
        "rlroute/seeding.py",
        "tests/test_sampling.py",
        (
            "Gumbel draws are upside down",
            "return -torch.log(-torch.log(uniform))",
            "return torch.log(-torch.log(uniform))",
        ),
    ),
    *faults(
        "rlroute/rewards.py",
        "tests/test_rewards.py",
        ("the loss is the reward", "return -loss_MT", "return +loss_MT"),
    ),
    *faults(
        "rlroute/kernels/activations.py",
        "tests/test_transformer.py",
        ("SwiGLU's gate is a plain sigmoid", "functional.silu(inner_NF)", "functional.sigmoid(inner_NF)"),
    ),
    *faults(
        "experiments/comparison/entries.py",
        "tests/test_table.py",
        (
            "other validation tokens are let in",
            '    "summary.eval_tokens_sha256": "losses on other validation tokens cannot be subtracted",',
            "",
        ),
        (
            "another number of threads is let in",
            '    "environment.threads": "bits and speed change with the number of threads",',
            "",
        ),
    ),
]


def stale() -> list[str]:
    """Return what is wrong with the list: texts that do not occur exactly once."""
    complaints = []
    for mutant in MUTANTS:
        try:
            mutant.planted(ROOT)
        except ValueError as error:
            complaints.append(str(error))
    return complaints


def copy_tree(root: Path, to: Path) -> Path:
    """Copy what tests need, without bytecode: that of a mutant may be as old and as long as the original's."""
    for name in filter(lambda name: (root / name).exists(), COPIED):
        source = root / name
        if source.is_dir():
            shutil.copytree(source, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            to.mkdir(exist_ok=True)
            shutil.copy(source, to / name)
    return to


def run_tests(root: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Run tests of a tree; return pytest's exit code, -1 where it did not end, and what it said."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    variables = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=root, env=os.environ | variables, capture_output=True, text=True, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end after {LONGEST} s"
    return done.returncode, done.stdout + done.stderr


def verdict(mutant: Mutant, root: Path) -> str:
    """Plant a mutant in a copy of the tree, run its tests, take it out again; say what became of it."""
    file = root / mutant.file
    healthy = file.read_text()
    file.write_text(mutant.planted(root))
    try:
        code, said = run_tests(root, mutant.tests.split())
    finally:
        file.write_text(healthy)
    if code == 0:
        return LIVED
    # Only a failed test is a death: a mutant that cannot be imported, never ends, or ends Python shows nothing.
    return KILLED if code == 1 and "\nFAILED " in said else f"BROKEN ({code})\n{said[-2000:]}"


def hunt(copies: Sequence[Path]) -> int:
    """Try every mutant, in as many threads as there are copies of the tree; return how many were not killed."""
    free: SimpleQueue[Path] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def attempt(mutant: Mutant) -> bool:
        copy, start = free.get(), time.perf_counter()
        try:
            found = verdict(mutant, copy)
        finally:
            free.put(copy)
        print(f"{time.perf_counter() - start:5.1f} s  {mutant.file}: {mutant.what}: {found}", flush=True)
        return found != KILLED

    with ThreadPoolExecutor(len(copies)) as pool:
        return sum(pool.map(attempt, MUTANTS))


def main() -> int:
    """Check the list, run the tests named on the healthy tree, then try every mutant; 1 where one was not killed."""
    if complaints := stale():
        print(*complaints, sep="\n")
        return 1
    with TemporaryDirectory(prefix="rlroute-mutants-") as folder:
        copies = [copy_tree(ROOT, Path(folder, str(worker))) for worker in range(WORKERS)]
        code, said = run_tests(copies[0], sorted({name for mutant in MUTANTS for name in mutant.tests.split()}))
        if code != 0:
            print(f"The tests do not pass without any mutant:\n{said}")
            return 1
        left = hunt(copies)
    print(f"{len(MUTANTS)} mutants, {left} not killed")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
