"""The expert MLP that every router's tokens go through, its engines, and the primitives that it is made of."""

from rlroute.kernels.engines import ExpertWeights, choose_backend, expert_mlp, resolve_backend
from rlroute.kernels.form import PLAIN, Form
from rlroute.kernels.plan import Plan, make_plan
from rlroute.kernels.primitives import combine, gather_linear, linear_combine, sum_rows

__all__ = [
    "PLAIN",
    "ExpertWeights",
    "Form",
    "Plan",
    "choose_backend",
    "combine",
    "expert_mlp",
    "gather_linear",
    "linear_combine",
    "make_plan",
    "resolve_backend",
    "sum_rows",
]
