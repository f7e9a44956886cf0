"""A seeded mixture of Markov chains whose entropy and hidden domain labels are known: the loss floor and the oracle
routing.

In domain d, whatever the context, the r-th likeliest next byte (r from 1) has probability proportional to 1 / (r +
d)^2, a Zipf-Mandelbrot law; *which* byte that is, a random permutation drawn for each domain and context says. So every
state of a chain has the same entropy, the entropy rate needs no stationary distribution, and it is exact from the first
byte on.

Everything is drawn in integers from NumPy's Philox bit generator, whose stream NumPy guarantees: same bytes on every
machine.

Shape suffixes: D domains, C contexts, V byte alphabet, N documents, S bytes of a document.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlroute.errors import DataError
from rlroute.seeding import numpy_generator
from rlroute.training.documents import Document

MAX_CELLS = 2**22
MAX_BYTES = 2**27


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The chains and how much is drawn from them.

    Attributes:
        domains: number of chains; low ones are the more predictable.
        vocab: bytes 0 to vocab - 1 are used.
        length: bytes of each document.
        documents: number of documents, each of one domain, drawn uniformly.
        order: bytes of context that the next byte depends on; before a document's start they count as 0.
        seed: of the permutations and of all draws.

    Raises:
        DataError: a value out of range.
    """

    domains: int = 8
    vocab: int = 64
    length: int = 256
    documents: int = 4000
    order: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "domains": (1, 1024),
            "vocab": (2, 256),
            "length": (1, 2**20),
            "documents": (2, 2**20),
            "order": (1, 16),
            "seed": (0, 2**63),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise DataError(f"corpus 'synth:': {name} = {getattr(self, name)}, legal is {low} to {high}")
        cells = self.domains * self.vocab ** (self.order + 1)
        if cells > MAX_CELLS:
            raise DataError(f"corpus 'synth:': domains x vocab^(order + 1) = {cells}, legal is at most {MAX_CELLS}")
        if self.documents * self.length > MAX_BYTES:
            raise DataError(
                f"corpus 'synth:': documents x length = {self.documents * self.length}, legal is at most {MAX_BYTES}"
            )

    def weights(self, domain: int) -> np.ndarray:
        """Return the integer weight of each rank, shape (V,); divided by their sum they are the next byte's
        probabilities, falling.
        """
        return 2**24 // (np.arange(1, self.vocab + 1) + domain) ** 2

    def entropy(self, domain: int) -> float:
        """Return the entropy of a domain's next byte given its context, in bits: the chain's entropy rate."""
        weights_V = self.weights(domain).tolist()
        total = sum(weights_V)
        return math.fsum(w / total * math.log2(total / w) for w in weights_V)

    def floor(self, documents: Sequence[Document]) -> float:
        """Return the expected bits per byte of a model that knows every chain and each of these documents' domain.

        No model that has to infer the domain, or to predict where a document ends, does better in expectation. Rounded
        to nine digits, because the last ones depend on the machine's logarithm.
        """
        return round(math.fsum(self.entropy(d.domain) for d in documents if d.domain is not None) / len(documents), 9)

    def successors(self) -> np.ndarray:
        """Return the byte at each rank, shape (D, C, V); a context is its bytes read as a number, the latest last."""
        cells_DCV = self._draw("successors", self.domains, self.vocab**self.order, self.vocab)
        return np.argsort(cells_DCV, axis=-1, kind="stable")

    def sample(self) -> list[Document]:
        """Draw the documents."""
        successors_DCV = self.successors()
        domain_N = self._draw("domain", self.documents) % self.domains
        draw_NS = self._draw("rank", self.documents, self.length)
        rank_NS = np.zeros(draw_NS.shape, dtype=np.int64)
        for domain in range(self.domains):
            edges_V = np.cumsum(self.weights(domain)).astype(np.uint64)
            rows = domain_N == domain
            rank_NS[rows] = np.searchsorted(edges_V, draw_NS[rows] % edges_V[-1], side="right")
        text_NS = np.zeros(draw_NS.shape, dtype=np.uint8)
        context_N = np.zeros(self.documents, dtype=np.int64)
        for i in range(self.length):
            byte_N = successors_DCV[domain_N, context_N, rank_NS[:, i]]
            text_NS[:, i] = byte_N
            context_N = (context_N * self.vocab + byte_N) % self.vocab**self.order
        return [Document(f"{n:07d}", text_S.tobytes(), int(domain_N[n])) for n, text_S in enumerate(text_NS)]

    def _draw(self, purpose: str, *shape: int) -> np.ndarray:
        raw = numpy_generator("synth", self.seed, purpose).bit_generator.random_raw(math.prod(shape))
        return np.asarray(raw, dtype=np.uint64).reshape(shape)
