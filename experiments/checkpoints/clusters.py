"""``rlroute export-clusters``: tables of experts from the token embeddings of a trained model, for ``hash:table=file``.

Hash layers, Roller et al. 2021 (arXiv 2106.04426): tokens are clustered by k-means, as many clusters as experts. A
*clustered* table gives a token the expert of its cluster, so that like tokens have the same one; a *dispersed* one
spreads the tokens of each cluster over all experts, so that like tokens have different ones, and was better there. For
k > 1 a clustered table goes on with the next nearest clusters. *balanced*, which is ours, is clustered but for experts
that are full: the most frequent tokens choose first, and each expert takes its fair share of the training corpus.

Shape suffixes: V vocabulary, D model width, E experts (clusters), K experts per token.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Form = Literal["clustered", "balanced", "dispersed"]
ROUNDS = 100
"""The most rounds of k-means; it ends where no token moves."""


def cluster_table(
    embed_VD: np.ndarray, counts_V: np.ndarray, experts: int, k: int, form: Form, seed: int
) -> np.ndarray:
    """Return the k experts of each token id, int16 of shape (V, 1, k): one table for all sites.

    Args:
        embed_VD: embeddings of tokens.
        counts_V: how often each occurs where the table is used.
        experts: E.
        k: experts of a token.
        form: how experts follow from clusters.
        seed: the first centres are drawn by it.
    """
    distances_VE = k_means(embed_VD.astype(np.float64), experts, np.random.default_rng(seed))
    if form == "clustered":
        table_VK = distances_VE.argsort(axis=1, kind="stable")[:, :k]
    elif form == "balanced":
        table_VK = _balanced(distances_VE, counts_V, k)
    else:
        table_VK = _dispersed(distances_VE.argmin(axis=1), counts_V, experts, k)
    return table_VK.astype(np.int16)[:, None]


def k_means(points_VD: np.ndarray, clusters: int, generator: np.random.Generator) -> np.ndarray:
    """Return the squared distance of each point to each cluster's centre, shape (V, E).

    Centres start at points that are drawn in proportion to their squared distance to the centres before (k-means++,
    Arthur and Vassilvitskii 2007); a cluster that loses its last point keeps its centre.
    """
    centres_ED = points_VD[generator.integers(len(points_VD), size=1)]
    while len(centres_ED) < clusters:
        nearest_V = _distances(points_VD, centres_ED).min(axis=1)
        share_V = nearest_V / nearest_V.sum() if nearest_V.any() else None
        centres_ED = np.concatenate([centres_ED, points_VD[generator.choice(len(points_VD), size=1, p=share_V)]])
    before_V = np.full(len(points_VD), -1)
    for _ in range(ROUNDS):
        distances_VE = _distances(points_VD, centres_ED)
        if np.array_equal(before_V, before_V := distances_VE.argmin(axis=1)):
            break
        for cluster in range(clusters):
            if (inside_V := before_V == cluster).any():
                centres_ED[cluster] = points_VD[inside_V].mean(axis=0)
    return distances_VE


def _distances(points_VD: np.ndarray, centres_ED: np.ndarray) -> np.ndarray:
    lengths = (points_VD**2).sum(axis=1)[:, None] + (centres_ED**2).sum(axis=1)
    distances_VE: np.ndarray = np.maximum(lengths - 2 * points_VD @ centres_ED.T, 0)
    return distances_VE


def _balanced(distances_VE: np.ndarray, counts_V: np.ndarray, k: int) -> np.ndarray:
    """Give each token, the most frequent first, its nearest experts with room; the least loaded where there are too
    few.
    """
    experts = distances_VE.shape[1]
    load_E, fair = np.zeros(experts), k * counts_V.sum() / experts
    table_VK = np.empty((len(distances_VE), k), dtype=np.int64)
    for token in np.argsort(-counts_V, kind="stable"):
        full_E = load_E >= fair
        rank_E = np.where(full_E, load_E, distances_VE[token])
        table_VK[token] = np.lexsort((rank_E, full_E))[:k]
        load_E[table_VK[token]] += counts_V[token]
    return table_VK


def _dispersed(cluster_V: np.ndarray, counts_V: np.ndarray, experts: int, k: int) -> np.ndarray:
    """Give each token of a cluster, the most frequent first, the experts with fewest tokens of that cluster, of these
    the least loaded.
    """
    load_E, tokens_CE = np.zeros(experts), np.zeros((experts, experts))
    table_VK = np.empty((len(cluster_V), k), dtype=np.int64)
    for token in np.argsort(-counts_V, kind="stable"):
        of_cluster_E = tokens_CE[cluster_V[token]]
        table_VK[token] = np.lexsort((load_E, of_cluster_E))[:k]
        of_cluster_E[table_VK[token]] += 1
        load_E[table_VK[token]] += counts_V[token]
    return table_VK
