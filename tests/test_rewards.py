"""Rewards and returns, in torch and NumPy alike."""

import numpy as np
import pytest
import torch

from rlroute.rewards import discounted_return, own_token_reward, temporal_differences

SEQUENCE_T = [4, 4, 4, 4, 4, 9, 2, 2, 2]
LOSS_MT = np.random.default_rng(0).random((2, 9))


def _recursion(reward_T: list[float], discount: float) -> list[float]:
    """G_t = r_t + discount * G_{t+1} within a sequence, by its definition."""
    returns: list[float] = []
    for t in reversed(range(len(reward_T))):
        goes_on = t + 1 < len(reward_T) and SEQUENCE_T[t] == SEQUENCE_T[t + 1]
        returns.insert(0, reward_T[t] + (discount * returns[0] if goes_on else 0.0))
    return returns


def test_own_token_reward_is_minus_the_loss() -> None:
    np.testing.assert_array_equal(own_token_reward(LOSS_MT), -LOSS_MT)
    assert torch.equal(own_token_reward(torch.from_numpy(LOSS_MT)), -torch.from_numpy(LOSS_MT))


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_discounted_return(discount: float) -> None:
    expected_MT = [_recursion(reward_T, discount) for reward_T in LOSS_MT.tolist()]
    before_MT = LOSS_MT.copy()
    in_numpy = discounted_return(LOSS_MT, np.array(SEQUENCE_T), discount)
    in_torch = discounted_return(torch.from_numpy(LOSS_MT), torch.tensor(SEQUENCE_T), discount)
    np.testing.assert_allclose(in_numpy, expected_MT, rtol=1e-13)
    np.testing.assert_allclose(in_torch.numpy(), expected_MT, rtol=1e-13)
    np.testing.assert_array_equal(LOSS_MT, before_MT)


def test_discount_0_is_the_own_reward() -> None:
    np.testing.assert_array_equal(discounted_return(LOSS_MT, np.array(SEQUENCE_T), 0.0), LOSS_MT)


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_temporal_differences(discount: float) -> None:
    value_MT = np.random.default_rng(1).random((2, 9))
    ends_T = np.append(np.diff(SEQUENCE_T) != 0, True)
    following_MT = np.where(ends_T, 0.0, np.roll(value_MT, -1, axis=1))
    want_MT = LOSS_MT + discount * following_MT - value_MT
    in_numpy = temporal_differences(LOSS_MT, value_MT, np.array(SEQUENCE_T), discount)
    tensors = torch.from_numpy(LOSS_MT), torch.from_numpy(value_MT), torch.tensor(SEQUENCE_T)
    np.testing.assert_allclose(in_numpy, want_MT, rtol=1e-13)
    np.testing.assert_allclose(temporal_differences(*tensors, discount).numpy(), want_MT, rtol=1e-13)


@pytest.mark.parametrize("discount", [0.5, 1.0])
def test_their_discounted_sum_is_the_return_over_the_value(discount: float) -> None:
    value_MT, sequence_T = np.random.default_rng(1).random((2, 9)), np.array(SEQUENCE_T)
    differences_MT = temporal_differences(LOSS_MT, value_MT, sequence_T, discount)
    advantage_MT = discounted_return(differences_MT, sequence_T, discount)
    np.testing.assert_allclose(advantage_MT, discounted_return(LOSS_MT, sequence_T, discount) - value_MT, atol=1e-13)
