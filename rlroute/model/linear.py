"""Linear maps: one whose weights derive from a key, one whose weights are an embedding's."""

from torch import Tensor, nn

from rlroute import seeding


class KeyedLinear(nn.Linear):
    """A linear map without bias, initialised from its key."""

    def __init__(self, d_in: int, d_out: int, std: float, seed: int, name: str) -> None:
        super().__init__(d_in, d_out, bias=False)
        seeding.init_normal(self.weight, std, seed, name)


class TiedLinear(nn.Module):
    """A linear map without parameters of its own: an embedding's are its weights."""

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        self._embed = [embed]  # in a list it is no part of this module: its weights have one name

    @property
    def weight(self) -> Tensor:
        """Shape (V, D)."""
        return self._embed[0].weight

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return a score for each row of the weights."""
        return nn.functional.linear(x_BSD, self.weight)
