"""Which parts of a model train. What does not is frozen: it has no gradient, no state of the optimizer and no weight
decay, no share in a clipped norm, and the same bits afterwards.

A frozen router decides as before, and its terms still reach the hidden states that it reads; it observes and adapts
nothing, so that its biases and running means stay as well.
"""

from torch import nn

from rlroute.config import TrainConfig
from rlroute.errors import ConfigError
from rlroute.model.attention import Mixer, RoutedAttention
from rlroute.model.transformer import Transformer


def freeze(model: Transformer, config: TrainConfig) -> None:
    """Freeze what a run does not train.

    Raises:
        ConfigError: nothing is left.
    """
    if not config.routers_train:
        for router in model.routers:
            router.freeze()
    if config.parts != "all":
        trained = {id(p) for module in _modules(model, config.parts) for p in module.parameters()}
        outside = config.parts == "non-moe"
        for parameter in model.parameters():
            if (id(parameter) in trained) == outside:
                parameter.requires_grad_(False)
    learning = config.routers_train and any(router.learns_from for router in model.routers)
    if not learning and not any(parameter.requires_grad for parameter in model.parameters()):
        routers = ", ".join(dict.fromkeys(router.config.name for router in model.routers)) or "no router"
        raise ConfigError(f"train.parts = {config.parts!r}: nothing of the model trains, which has {routers}")


def _modules(model: Transformer, parts: str) -> list[nn.Module]:
    """Return the modules that train and no others; of ``non-moe`` those that do not."""
    if parts == "router":
        return list(model.routers)
    if parts == "attention":
        return [m for m in model.modules() if isinstance(m, Mixer | RoutedAttention)]
    return list(model.routed)
