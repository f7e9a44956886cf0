"""What softmax top-k routers share: linear scores, softmax over all experts, the k largest.

Shape suffixes: T tokens, D model width, E experts, K experts per token.
"""

from torch import Tensor

from rlroute.routing import LinearScores, RoutingDecision
from rlroute.sampling import top_k


def softmax_top_k(scores: LinearScores, x_TD: Tensor, k: int, *, normalize: bool) -> RoutingDecision:
    """Route each token to its k most probable experts, gated by their probabilities.

    With ``normalize`` and k > 1 the gates are renormalised over the chosen (GShard, Mixtral). A single gate never is: it would be a
    constant 1 and cut the router's gradient.
    """
    logits_TE = scores(x_TD)
    probs_TE = logits_TE.softmax(1)
    ids_TK = top_k(logits_TE, k)
    gates_TK = probs_TE.gather(1, ids_TK)
    if normalize and k > 1:
        gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
    return RoutingDecision.token_choice(ids_TK, gates_TK, probs_TE.shape[1], logits_TE=logits_TE, probs_TE=probs_TE)
