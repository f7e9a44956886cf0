"""Per-token rewards, one for training and environments alike: plain arithmetic that serves torch and NumPy.

Shape suffixes: T tokens, M routing samples.
"""

from typing import TypeVar

Array = TypeVar("Array")


def own_token_reward(loss_MT: Array) -> Array:
    """Return each token's own negative next-token loss, in nats, of the shape of ``loss_MT``.

    Biased except after the last attention layer: a token's route also changes what later tokens attend to.
    """
    return -loss_MT  # type: ignore[no-any-return, operator]
