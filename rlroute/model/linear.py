"""A linear map whose weights derive from a key."""

from torch import nn

from rlroute import seeding


class KeyedLinear(nn.Linear):
    """A linear map without bias, initialised from its key."""

    def __init__(self, d_in: int, d_out: int, std: float, seed: int, name: str) -> None:
        super().__init__(d_in, d_out, bias=False)
        seeding.init_normal(self.weight, std, seed, name)
