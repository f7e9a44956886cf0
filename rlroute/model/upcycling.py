"""A dense model's state as that of a mixture: sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055).

Each expert is the dense MLP, or one of G equal pieces of its width where experts are narrower: granular upcycling with
virtual groups (He et al. 2024, arXiv 2410.07524). Pieces come one after the other: of E experts, the first E / G are
the first piece. Out of a piece comes G times what it gave, since a token's gates, which sum to 1, are shared among the
pieces: the function is the dense model's wherever a token's experts have every piece in equal parts. So routers with
scores start with the same row for the pieces of one copy, and take them together where k is a multiple of G.

Shape suffixes: E experts, G pieces, P projections into the MLP (gate and up, or one), D model width, F dense width, W
width of an expert.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlroute import seeding
from rlroute.errors import ConfigError
from rlroute.model.transformer import Transformer
from rlroute.start import StartConfig

DENSE_IN, DENSE_OUT = "mlp.experts.in_EHD", "mlp.experts.out_EDF"
IN, OUT = "moe.experts.in_EHD", "moe.experts.out_EDF"
State = Mapping[str, Tensor]


def upcycled(source: State, whole: State, start: StartConfig, seed: int, *, weights: bool = True) -> dict[str, Tensor]:
    """Return a dense model's state with experts in place of the MLPs of those blocks that have experts in the model.

    Args:
        source: the dense model's state.
        whole: the mixture's, whose shapes alone are looked at.
        start: how.
        seed: noise and what is drawn anew derive from it, by expert.
        weights: False for an optimizer's moments of them: cut and copied, never scaled or drawn.

    Raises:
        ConfigError: the MLP cannot be cut into such experts, or not shared out among so many.
    """
    made = dict(source)
    for name in [name for name in whole if name.endswith(IN)]:
        block = name.removesuffix(IN)
        if block + DENSE_IN in source:
            _refuse_beside(whole, block)
            in_HD, out_DF = made.pop(block + DENSE_IN)[0], made.pop(block + DENSE_OUT)[0]
            in_EPWD, out_EDW = _experts(in_HD, out_DF, _pieces(out_DF.shape[1], whole[block + OUT]), len(whole[name]))
            if weights:
                out_EDW *= out_DF.shape[1] // out_EDW.shape[2]
                for expert, (in_PWD, out_DW) in enumerate(zip(in_EPWD, out_EDW, strict=True)):
                    _vary(in_PWD, out_DW, start, seed, f"{block}{expert}")
            made[name], made[block + OUT] = in_EPWD.flatten(1, 2), out_EDW
        elif weights:
            raise ConfigError(
                f"start.upcycle = True: start.run = {start.run!r} has no {block}{DENSE_IN}: it is not dense"
            )
    return made


def _experts(in_HD: Tensor, out_DF: Tensor, pieces: int, experts: int) -> tuple[Tensor, Tensor]:
    """Return the pieces of an MLP as so many experts: each piece's copies, one piece after the other."""
    d_model, width = out_DF.shape
    in_GPWD = in_HD.reshape(-1, pieces, width // pieces, d_model).transpose(0, 1)
    out_GDW = out_DF.reshape(d_model, pieces, -1).transpose(0, 1)
    copies = experts // pieces
    return in_GPWD.repeat_interleave(copies, 0), out_GDW.repeat_interleave(copies, 0)


def _refuse_beside(whole: State, block: str) -> None:
    """Refuse a layer that has more than routed experts, which a dense MLP says nothing of."""
    ours = (f"{block}moe.experts.", f"{block}moe.router.")
    others = [name for name in whole if name.startswith(f"{block}moe.") and not name.startswith(ours)]
    if others:
        raise ConfigError(
            f"start.upcycle = True in a model with {others[0]}: legal are routed experts alone, without "
            "model.num_shared_experts, model.d_latent and model.constant_experts"
        )


def _pieces(width: int, out_EDW: Tensor) -> int:
    """Return into how many pieces an MLP is cut.

    Raises:
        ConfigError: it cannot be.
    """
    experts, _, each = out_EDW.shape
    if width % each:
        raise ConfigError(f"model.d_expert = {each}: must divide the dense model's width {width}")
    if experts % (width // each):
        raise ConfigError(f"model.num_experts = {experts}: must be a multiple of the {width // each} pieces of the MLP")
    return width // each


def _vary(in_PWD: Tensor, out_DW: Tensor, start: StartConfig, seed: int, key: str) -> None:
    """Change one expert's copy in place: draw some of its units anew (Drop-Upcycling, Nakamura et al. 2025, arXiv
    2502.19261: from a normal distribution of the mean and spread of what they replace), and add noise to all.
    """
    matrices = [*in_PWD, out_DW.t()]  # one row a unit
    spreads = [float(matrix_WX.std()) for matrix_WX in matrices]
    if count := round(start.upcycle_drop * out_DW.shape[1]):
        units = torch.from_numpy(
            seeding.numpy_generator(seed, "upcycle.units", key).permutation(out_DW.shape[1])[:count]
        )
        for index, matrix_WX in enumerate(matrices):
            old, new = matrix_WX[units], torch.empty_like(matrix_WX[units])
            seeding.init_normal(new, float(old.std()), seed, "upcycle.drop", key, index)
            matrix_WX[units] = new + old.mean()
    if start.upcycle_noise:
        for index, (matrix_WX, spread) in enumerate(zip(matrices, spreads, strict=True)):
            noise = torch.empty_like(matrix_WX)
            seeding.init_normal(noise, start.upcycle_noise * spread, seed, "upcycle.noise", key, index)
            matrix_WX += noise


@torch.no_grad()
def group_scores(model: Transformer, source: State) -> None:
    """Let routers score the pieces of one copy alike: the rows of all pieces are those of the first one's copies.

    Args:
        model: a mixture whose experts are pieces, or copies, of a dense model's MLPs; its routers are at their initial
            weights.
        source: the dense model's state.
    """
    for router in model.routers:
        shape, scores = router.shape, getattr(router, "scores", None)
        if isinstance(shape.site, int) and isinstance(scores, nn.Module):
            pieces = source[f"layers.{shape.site}.{DENSE_OUT}"].shape[2] // shape.d_expert
            for parameter in scores.parameters():
                if len(parameter) == shape.num_experts:
                    rows_EX = parameter[: shape.num_real_experts].view(shape.num_real_experts, -1)
                    rows_EX.copy_(rows_EX[: len(rows_EX) // pieces].repeat(pieces, 1))
