"""Where the tokens of a corpus come from: hidden domains of synthetic text, else the folders of its files.

Shape suffixes: T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np

from rlroute.training.data import Corpus, read_documents
from rlroute.training.documents import split_documents

MOST = 24
"""Domains that are told apart; those with the fewest tokens are one together."""
OTHERS = "others"


@dataclass(frozen=True, eq=False)
class Domains:
    """A corpus whose validation tokens have domains.

    Attributes:
        corpus: with ``valid_domains``.
        names: of the domains, by number.
        meaning: what they are.
    """

    corpus: Corpus
    names: Sequence[str]
    meaning: str


def find_domains(corpus: Corpus) -> Domains | None:
    """Return the domains of a corpus; None where nothing says any: shards, or a single document.

    Folders are taken as deep as it takes to tell two apart; where all documents lie in one, they are the domains.

    Raises:
        DataError: the documents cannot be read.
    """
    spec: str = corpus.provenance["spec"]
    scheme = spec.partition(":")[0]
    if corpus.valid_domains is not None:
        count = int(max(corpus.valid_domains.max(), 0)) + 1
        return Domains(corpus, [f"domain {number}" for number in range(count)], "hidden domains of the synthetic text")
    if scheme == "bin":
        return None
    documents = split_documents(spec, read_documents(spec), by_name=scheme in ("file", "parquet")).valid
    labels, meaning = _folders([document.name for document in documents])
    opens_T = np.asarray(corpus.valid == corpus.vocab_size - 1)
    if opens_T.sum() != len(documents) or len(set(labels)) < 2:
        return None
    label_T = np.array(labels)[opens_T.cumsum() - 1]
    names = [str(name) for name, _ in Counter(label_T.tolist()).most_common()]
    if len(names) > MOST:
        names = [*names[: MOST - 1], OTHERS]
    numbers = {name: number for number, name in enumerate(names)}
    number_T = np.array([numbers.get(label, len(names) - 1) for label in labels])[opens_T.cumsum() - 1]
    return Domains(replace(corpus, valid_domains=number_T), names, meaning)


def _folders(paths: Sequence[str]) -> tuple[list[str], str]:
    """Return what tells documents apart, of each, and what that is."""
    parents = [PurePosixPath(path).parent.parts for path in paths]
    for depth in range(1, max(map(len, parents), default=0) + 1):
        cut = ["/".join(parent[:depth]) or "." for parent in parents]
        if len(set(cut)) > 1:
            return cut, "folders of the corpus"
    return list(paths), "documents of the corpus"
