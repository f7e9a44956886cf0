"""rlroute: compare the routers of mixture-of-experts transformers inside identical models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rlroute")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
