"""Latent clusters, each with an expert of its own: a routing task whose scores are known in closed form.

A token belongs to cluster c with probability proportional to (c + 1)^-skew. The router sees mu_c + sigma * noise in D
dimensions, |mu_c| = 2; the experts see z ~ N(0, I), which says nothing about c. The target is Q_c z + 0.05 * noise with
Q_c orthogonal, expert e is frozen at Q_e, and the loss is the squared error per coordinate: 0.0025 under the cluster's
own expert, 2 more under any other.

For the scores to have closed forms, the centres mu_c are orthogonal to one another, and so are the maps (Q_c shifts the
coordinates by c places, so that Q_c^T Q_e has trace 0). Token ids are uniform and independent of the cluster: a router
that reads them knows no more than one that does not, and the Bayes score bounds both.

Shape suffixes: N tokens, D features, W coordinates of the experts' input, E clusters and experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rlroute.envs.tables import TokenTable
from rlroute.errors import ConfigError

Floats = NDArray[np.float64]

RADIUS = 2.0
NOISE = 0.05
WIDTH = 32
VOCAB_PER_EXPERT = 8


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """The task, and how many tokens of it a table holds.

    Raises:
        ConfigError: a value out of range.
    """

    experts: int = 8
    """Clusters, and experts."""
    features: int = 16
    """What the router sees of a token; at least as many as clusters."""
    sigma: float = 0.35
    """Noise of each feature."""
    skew: float = 0.0
    """0: equally likely clusters; cluster c is drawn in proportion to (c + 1)^-skew."""
    tokens: int = 16384
    """Tokens in the table."""
    task_seed: int = 0
    """Of the centres and the tokens."""

    def __post_init__(self) -> None:
        integers = {"features": (2, 1024), "experts": (2, self.features), "tokens": (1, 2**22), "task_seed": (0, 2**63)}
        for name, (low, high) in integers.items():
            value = getattr(self, name)
            if not (isinstance(value, int) and low <= value <= high):
                raise ConfigError(f"clusters: {name} = {value!r}, legal are integers from {low} to {high}")
        if not 0 < self.sigma < math.inf:
            raise ConfigError(f"clusters: sigma = {self.sigma!r}, legal are numbers above 0")
        if not 0 <= self.skew < math.inf:
            raise ConfigError(f"clusters: skew = {self.skew!r}, legal are numbers from 0")

    @property
    def prior_E(self) -> Floats:
        """How likely each cluster is."""
        weight_E = np.arange(1, self.experts + 1, dtype=np.float64) ** -self.skew
        prior_E: Floats = weight_E / weight_E.sum()
        return prior_E

    def centres(self) -> Floats:
        """Return mu, orthogonal rows of length 2, shape (E, D)."""
        basis_DE, upper_EE = np.linalg.qr(self._generator(0).standard_normal((self.features, self.experts)))
        return RADIUS * (basis_DE * np.sign(np.diag(upper_EE))).T  # signs make the factor unique

    def bayes_actions(self, x_ND: NDArray[np.floating]) -> NDArray[np.int64]:
        """Return the likeliest cluster given what the router sees: the best that any router can do.

        Args:
            x_ND: features, shape (..., D).
        """
        score_NE = x_ND @ self.centres().T / self.sigma**2 + np.log(self.prior_E)
        actions_N: NDArray[np.int64] = score_NE.argmax(-1)
        return actions_N

    def ladder(self) -> dict[str, float]:
        """Return expected losses in closed form, best first.

        floor: the noise of the target, which no map predicts. oracle: the cluster's own expert, which is that map.
        bayes: the likeliest cluster's expert. fixed: the most frequent cluster's expert. uniform: experts drawn
        uniformly.
        """
        floor = NOISE**2
        return {
            "floor": floor,
            "oracle": floor,
            "bayes": floor + 2.0 * self.bayes_error(),
            "fixed": floor + 2.0 * (1.0 - float(self.prior_E.max())),
            "uniform": floor + 2.0 * (1.0 - 1.0 / self.experts),
        }

    def bayes_error(self) -> float:
        """Return the probability that the likeliest cluster is not the true one.

        With orthogonal centres the posterior scores are independent normals, so cluster c is found with probability
        E_g[prod_k Phi(g + 2 / sigma + sigma / 2 * log(prior_c / prior_k))] over k != c, g ~ N(0, 1): one integral, by
        Gauss-Hermite quadrature with 128 nodes.
        """
        nodes_G, weights_G = np.polynomial.hermite_e.hermegauss(128)
        log_prior_E = np.log(self.prior_E)
        found = 0.0
        for c, prior in enumerate(self.prior_E):
            margin_E = RADIUS / self.sigma + self.sigma / RADIUS * (log_prior_E[c] - np.delete(log_prior_E, c))
            found_G = _normal_cdf(nodes_G[:, None] + margin_E).prod(1)
            found += float(prior * (weights_G @ found_G) / weights_G.sum())
        return 1.0 - found

    def draw_table(self) -> TokenTable:
        """Return the table of this task, built once per process."""
        return _build_table(self)

    def _generator(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.task_seed, purpose])


def _normal_cdf(x: Floats) -> Floats:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2.0)) for value in x.flat]).reshape(x.shape)


@lru_cache(maxsize=8)
def _build_table(task: Clusters) -> TokenTable:
    generator, tokens, width = task._generator(1), task.tokens, max(WIDTH, task.experts)
    labels_N = generator.choice(task.experts, size=tokens, p=task.prior_E)
    x_ND = task.centres()[labels_N] + task.sigma * generator.standard_normal((tokens, task.features))
    z_NW = generator.standard_normal((tokens, width))
    shift_NW = (np.arange(width) - labels_N[:, None]) % width
    y_NW = np.take_along_axis(z_NW, shift_NW, 1) + NOISE * generator.standard_normal((tokens, width))
    losses_NE = np.stack([((y_NW - np.roll(z_NW, e, 1)) ** 2).mean(1) for e in range(task.experts)], 1)
    return TokenTable(
        x_ND=x_ND.astype(np.float32),
        losses_NE=losses_NE.astype(np.float32),
        skip_N=(y_NW**2).mean(1).astype(np.float32),
        token_ids_N=generator.integers(VOCAB_PER_EXPERT * task.experts, size=tokens),
        labels_N=labels_N,
    )
