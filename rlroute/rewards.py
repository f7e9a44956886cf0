"""Per-token rewards and returns, one for training and environments alike: plain arithmetic that serves torch and NumPy.

Nothing here imports torch at run time: environments run where it is not loaded.

Shape suffixes: T tokens, M routing samples.
"""

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", "torch.Tensor", np.ndarray[Any, Any])


def own_token_reward(loss_MT: Array) -> Array:
    """Return each token's own negative next-token loss, in nats, of the shape of ``loss_MT``.

    Biased except after the last attention layer: a token's route also changes what later tokens attend to.
    """
    return -loss_MT


def discounted_return(reward_MT: Array, sequence_T: Array, discount: float) -> Array:
    """Return each token's reward plus the discounted rewards of the tokens that follow it in its sequence.

    G_t = r_t + discount * G_{t+1}, and G_t = r_t at a sequence's last token (the reward-to-go of Williams 1992, doi
    10.1007/BF00992696). A discount of 1 takes in all that a token's route can change in a causal model: no bias, most
    noise.

    Args:
        reward_MT: rewards of shape (..., T), zero where a token does not count.
        sequence_T: the sequence of each token; the tokens of one are adjacent and in order.
        discount: from 0 (the own token alone) to 1.
    """
    return_MT = reward_MT * 1.0
    span = 1
    while span < len(sequence_T):  # by doubling: return_MT holds the sums over spans of 1, 2, 4 ... tokens
        same_T = sequence_T[span:] == sequence_T[:-span]
        return_MT[..., :-span] += discount**span * (same_T * return_MT[..., span:])
        span *= 2
    return return_MT


def temporal_differences(reward_MT: Array, value_MT: Array, sequence_T: Array, discount: float) -> Array:
    """Return r_t + discount * V_{t+1} - V_t, with V_{t+1} = 0 after a sequence's last token; of the shape of
    ``reward_MT``.

    Their discounted sum with discount * lambda is the generalised advantage (Schulman et al. 2016, arXiv 1506.02438).

    Args:
        reward_MT: rewards of shape (..., T), zero where a token does not count.
        value_MT: values of the tokens' states, likewise.
        sequence_T: the sequence of each token; the tokens of one are adjacent and in order.
        discount: from 0 to 1.
    """
    differences_MT: Array = reward_MT - value_MT
    same_T = sequence_T[1:] == sequence_T[:-1]
    differences_MT[..., :-1] += discount * (same_T * value_MT[..., 1:])
    return differences_MT
