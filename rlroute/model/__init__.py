"""The transformer that is identical for every router."""

from rlroute.model.transformer import ModelShape, Transformer

__all__ = ["ModelShape", "Transformer"]
