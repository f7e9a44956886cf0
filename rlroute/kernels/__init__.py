"""The shared sparse expert MLP: :func:`expert_mlp` is the only way to run experts, whatever router decided."""

from rlroute.kernels.engines import ExpertWeights, expert_mlp, resolve_backend

__all__ = ["ExpertWeights", "expert_mlp", "resolve_backend"]
