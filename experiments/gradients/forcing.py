"""Make a router take given experts without touching it: what it ranks comes out in the wanted order.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

RANKINGS: frozenset[Any] = frozenset({torch.argsort, torch.Tensor.argsort})
RANKINGS_WITH_VALUES: frozenset[Any] = frozenset({torch.topk, torch.Tensor.topk, torch.sort, torch.Tensor.sort})


class ForcedRanking(TorchFunctionMode):
    """While active, whoever ranks a matrix of scores by row finds ``ids_TK`` first, in this order."""

    def __init__(self, ids_TK: Tensor) -> None:
        super().__init__()
        self.ids_TK = ids_TK

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, ranks = kwargs or {}, func in RANKINGS or func in RANKINGS_WITH_VALUES
        if not ranks or args[0].dim() != 2 or len(args[0]) != len(self.ids_TK):
            return func(*args, **kwargs)
        places_K = torch.arange(self.ids_TK.shape[1], 0, -1, dtype=torch.float64)
        wanted_TE = torch.zeros(args[0].shape, dtype=torch.float64).scatter(
            1, self.ids_TK, places_K.expand_as(self.ids_TK)
        )
        found = func(wanted_TE, *args[1:], **kwargs)
        return found if func in RANKINGS else type(found)((args[0].gather(1, found.indices), found.indices))
