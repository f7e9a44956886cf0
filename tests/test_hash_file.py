"""Tables of experts from clusters of token embeddings, and the hash routers that read a table from a file.

Shape suffixes: V vocabulary, D model width, E experts, K experts per token.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlroute.baselines.hash import HashRouter
from rlroute.baselines.hash_gated import HashGatedRouter
from rlroute.config import RunConfig
from rlroute.errors import ConfigError, RlrouteError
from rlroute.experiments.checkpoints.clusters import cluster_table, k_means
from rlroute.experiments.recipes.entries import build_entry
from rlroute.reading import read_run
from rlroute.training.loop import train
from rlroute.training.prepare import check
from tests.commands import ran, refused, rlroute
from tests.conftest import D, draw, make_context, make_shape
from tests.tiny import DATA, MODEL, TRAIN

E = 4
BLOBS = np.repeat(np.arange(E), 10)
"""The cluster of each of 40 tokens."""


def blobs() -> np.ndarray:
    """Embeddings of four clusters that nobody can mistake."""
    generator = np.random.default_rng(3)
    return 10 * np.eye(E, 6)[BLOBS] + generator.normal(size=(40, 6)) / 10


def table(form: Any, counts_V: np.ndarray | None = None, k: int = 1) -> np.ndarray:
    found = cluster_table(blobs(), np.ones(40) if counts_V is None else counts_V, E, k, form, 0)
    assert found.shape == (40, 1, k) and all(len(set(row)) == k for row in found[:, 0].tolist())
    return found[:, 0]


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_found_whatever_the_first_centres(seed: int) -> None:
    cluster_V = k_means(blobs(), E, np.random.default_rng(seed)).argmin(1)
    assert len({(int(one), int(other)) for one, other in zip(BLOBS, cluster_V, strict=True)}) == E


def test_like_tokens_have_the_same_expert_or_different_ones() -> None:
    together = table("clustered").reshape(E, 10)
    assert all(len(set(row)) == 1 for row in together.tolist()) and len(set(together[:, 0].tolist())) == E
    for row in table("dispersed").reshape(E, 10).tolist():
        assert sorted(np.bincount(row, minlength=E).tolist()) == [2, 2, 3, 3], "each cluster is on all experts"
    assert np.array_equal(table("balanced"), table("clustered")), "clusters that are even are left as they are"
    nearest_VK = table("clustered", k=3)
    distances_VE = k_means(blobs(), E, np.random.default_rng(0))
    assert (np.diff(np.take_along_axis(distances_VE, nearest_VK.astype(np.int64), 1), axis=1) >= 0).all()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("form", ["balanced", "dispersed"])
def test_loads_are_even_but_for_the_most_frequent_token(form: str, k: int) -> None:
    counts_V = np.where(BLOBS == 0, 50, 1) * np.arange(1, 41)
    load_E = np.bincount(table(form, counts_V, k).reshape(-1), counts_V.repeat(k), minlength=E)
    assert load_E.max() <= k * counts_V.sum() / E + counts_V.max() * (2 if form == "dispersed" else 1)
    clustered_E = np.bincount(table("clustered", counts_V, k).reshape(-1), counts_V.repeat(k), minlength=E)
    assert load_E.max() < clustered_E.max()


def test_more_clusters_than_different_points_are_survived() -> None:
    found = cluster_table(np.zeros((5, 3)), np.zeros(5, dtype=np.int64), 4, 2, "balanced", 0)
    assert found.shape == (5, 1, 2)


# The routers that read one


def saved(path: Path, table_VLK: np.ndarray) -> str:
    np.save(path, table_VLK)
    return str(path)


@pytest.mark.parametrize("router", [HashRouter, HashGatedRouter])
@pytest.mark.parametrize("sites", [1, 3])
def test_experts_are_those_of_the_file_at_each_site(router: type[HashRouter], sites: int, tmp_path: Path) -> None:
    table_VLK = np.random.default_rng(0).random((11, sites, 8)).argsort(2)[:, :, :2]
    config = router.Config(table="file", file=saved(tmp_path / "t.npy", table_VLK))
    context = make_context(12)
    for index in range(3):
        made = router(config, make_shape(8, 2, num_sites=3, site_index=index, vocab_size=11))
        ids_TK = made(draw(12, D).float(), context).expert_ids_R.view(12, 2)
        assert torch.equal(ids_TK, torch.from_numpy(table_VLK[:, index % sites])[context.token_ids_T])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], r"has a table of shape \(10, 1, 2\), .* want \(11, 1, 2\) or \(11, 3, 2\)"),
        (lambda t: np.concatenate([t, t], 1), r"has a table of shape \(11, 2, 2\)"),
        (lambda t: np.concatenate([t, t + 1], 2), r"has a table of shape \(11, 1, 4\)"),
        (lambda t: t + 7, "names experts 7 to 8: legal are 0 to 7"),
        (lambda t: -t, "names experts -1 to 0: legal are 0 to 7"),
        (lambda t: t * 0, "gives token 0 an expert twice: want 2 of its own"),
        (lambda t: t / 2, "want whole numbers of shape"),
        (lambda t: t[:, 0], "want whole numbers of shape"),
    ],
)
def test_files_that_are_no_table_of_the_model_are_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    table_VLK = np.tile(np.array([0, 1]), (11, 1, 1))
    config = HashRouter.Config(table="file", file=saved(tmp_path / "t.npy", change(table_VLK)))
    with pytest.raises(RlrouteError, match=message) as error:
        HashRouter(config, make_shape(8, 2, num_sites=3, vocab_size=11))
    assert "t.npy" in str(error.value)


def test_the_file_is_part_of_what_a_run_is(tmp_path: Path) -> None:
    file = saved(tmp_path / "t.npy", np.zeros((257, 1, 1), dtype=np.int16))
    one = HashRouter.Config(table="file", file=file)
    assert one.sha256 == one.reads()["table"] and len(one.sha256) == 64
    saved(tmp_path / "t.npy", np.ones((257, 1, 1), dtype=np.int16))
    other = HashRouter.Config(table="file", file=file)
    assert RunConfig(router=one).content_hash() != RunConfig(router=other).content_hash()
    with pytest.raises(ConfigError, match=r"has SHA-256 .* another table needs another run"):
        HashRouter(one, make_shape(8, 1, vocab_size=257))
    for fields, message in (
        ({"table": "file"}, r"hash\.file = '' with table = 'file'"),
        ({"file": file}, r"hash\.file = .* with table = 'random'"),
        ({"sha256": "0"}, "sha256 = '0' does nothing without a file"),
        ({"table": "file", "file": str(tmp_path / "none.npy")}, "cannot be read: No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            HashRouter.Config(**fields)  # type: ignore[arg-type]


def test_a_run_s_clusters_are_exported_and_routed_by(tmp_path: Path) -> None:
    config = build_entry("dense", DATA, MODEL, TRAIN)
    train(config, 0, tmp_path / "runs")
    file, again = tmp_path / "out/clusters.npy", tmp_path / "again.npy"
    for path in (file, again):
        said = ran("export-clusters", "dense", path, "--store", tmp_path / "runs", "--form", "clustered")
    assert file.read_bytes() == again.read_bytes() and f"hash:table=file,file={again}" in said
    entry = build_entry(f"hash:table=file,file={file}", DATA, MODEL, TRAIN)
    check({entry: [0]})
    train(entry, 0, tmp_path / "runs")
    record = read_run(tmp_path / "runs" / entry.run_id(0))
    assert record.summary["status"] == "finished" and str(record.config["config"]["router"]["sha256"])
    for words, message in (
        (("dense", tmp_path / "x.npz"), "legal are names that end in .npy"),
        (("dense", tmp_path / "x.npy", "--k", "9"), "--k 9: legal are 1 to --experts "),
        (("nobody", tmp_path / "x.npy"), "holds no ended run"),
    ):
        assert message in refused(rlroute("export-clusters", *words, "--store", tmp_path / "runs"))
