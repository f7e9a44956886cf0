"""The command ``import``."""

from __future__ import annotations

from pathlib import Path

import tyro

from rlroute.experiments.cli.folders import make_folder
from rlroute.foreign import printable


def import_(checkpoint: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path] = Path("results/imported")) -> None:
    """Read the MoE blocks of a Hugging Face checkpoint as layers of ours, one file each, and print the router and the
    model options that they are.

    Args:
        checkpoint: a folder with config.json and .safetensors, or one such file beside its config.json.
        out: a folder for layer-000.safetensors and so on.
    """
    from rlroute.experiments.checkpoints.folder import open_checkpoint
    from rlroute.experiments.checkpoints.imported import write_layers

    opened = open_checkpoint(checkpoint)
    make_folder(out)
    layers = write_layers(opened, out)
    for options in dict.fromkeys(layer.options for layer in layers):
        alike = [layer for layer in layers if layer.options == options]
        print(printable(f"{len(alike)} of {opened.kind}, {alike[0].place} to {alike[-1].place}: {' '.join(options)}"))
    print(f"{len(layers)} layers in {out}/")


import_.__name__ = "import"  # which no function can be called where it is defined
