"""docs/export.svg: which tensors an exported mixture has, of which shapes, and what each does, by the names and shapes
that the code gives: ``python -m tests.export_figure`` writes it.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from rlroute.experiments.checkpoints.moe_file import moe_tensors
from tests import ROOT
from tests.drawing import GREY, drawing, element
from tests.tiny import make_model, small_config

FIGURE = ROOT / "docs" / "export.svg"
WIDTH, LINE = 215, 20
"""Of a box, and the height of a line in it."""
FIRST, SECOND, THIRD, FOURTH, END = 60, 300, 555, 810, 1075
"""Where the columns of boxes begin, and where the sum stands."""
SIZES = {1: "1", 2: "2", 3: "J", 5: "E", 7: "F", 8: "E + J", 9: "P", 18: "2 P", 22: "latent", 28: "S F", 38: "D"}
"""What the sizes of the model below are called: all differ, so that each says what it is."""


class Box(NamedTuple):
    """Tensors that work together.

    Attributes:
        left, top: where it stands.
        names: theirs.
        said: below them: what they do, or the option that they come with.
    """

    left: int
    top: int
    names: Sequence[str]
    said: str = ""

    @property
    def middle(self) -> float:
        """How far down the arrows meet it."""
        return self.top + (LINE * len(self.names) + 8) / 2


BOXES = {
    "router": Box(FIRST, 60, ["router.scores.weight", "router.bias_E"], "logits and choice, of linear scores"),
    "down": Box(FIRST, 155, ["latent.down"], "--model.d-latent"),
    "in": Box(
        SECOND, 125, ["experts.gate", "experts.up", "experts.gate_bias", "experts.up_bias"], "h = act(gate x) ⊙ up x"
    ),
    "out": Box(THIRD, 145, ["experts.down", "experts.down_bias"], "gate of the pair · down h, summed"),
    "up": Box(FOURTH, 155, ["latent.up"], "--model.d-latent"),
    "shared in": Box(SECOND, 260, ["shared.gate", "shared.up"], "every token's, S as one MLP"),
    "shared out": Box(THIRD, 270, ["shared.down"]),
    "shared gate": Box(FOURTH, 270, ["shared_gate"], "· sigmoid(w x), --model.shared-gate"),
    "mix": Box(SECOND, 355, ["constants.mix"], "(a, b) = softmax(mix x)"),
    "vector": Box(THIRD, 355, ["constants.vector"], "a x + b vector, --model.constant-experts"),
    "attention router": Box(FIRST, 490, ["attention.router.scores.weight", "attention.router.bias_E"]),
    "query": Box(SECOND, 536, ["attention.experts.query"], "queries of a pair, P channels"),
    "kv": Box(SECOND, 600, ["attention.kv"], "keys and values, the same for all experts"),
    "attention out": Box(THIRD, 536, ["attention.experts.out"], "gate of the pair · out, summed"),
}
ARROWS = [
    ("router", "in"),
    ("down", "in"),
    ("in", "out"),
    ("out", "up"),
    ("shared in", "shared out"),
    ("shared out", "shared gate"),
    ("mix", "vector"),
    ("attention router", "query"),
    ("kv", "attention out"),
    ("query", "attention out"),
]
HEADS = {
    "layers.n: experts in the place of an MLP": 30,
    "layers.n.attention: experts in attention, with --model.attention-experts": 465,
}


def layout() -> dict[str, str]:
    """Return the shapes of a file with every kind of tensor, by names without the layer's."""
    model = small_config(
        num_layers=1,
        d_model=38,
        num_heads=2,
        head_width=9,
        num_kv_heads=1,
        num_experts=5,
        d_expert=7,
        num_shared_experts=4,
        shared_gate="sigmoid",
        d_latent=22,
        constant_experts=3,
        expert_bias=True,
        attention_experts=5,
    )
    run: Any = SimpleNamespace(model=make_model("topk", model, score="sigmoid", bias_rate=0.1))
    found = {name.removeprefix("layers.0."): tensor.shape for name, tensor in moe_tensors(run).items()}
    return {name: ", ".join(SIZES[size] for size in shape) for name, shape in found.items()}


def box_of(box: Box, shapes: Mapping[str, str]) -> list[str]:
    """Return a box: a line for each tensor, with its shape; those of each expert are tinted."""
    tint = "#e3eef8" if all(shapes[name].startswith("E") for name in box.names) else "#f4f4f4"
    size = {"x": box.left, "y": box.top, "width": WIDTH, "height": LINE * len(box.names) + 8}
    parts = [element("rect", **size, rx=3, fill=tint, stroke=GREY)]
    for place, name in enumerate(box.names, 1):
        y = box.top + LINE * place - 2
        parts.append(element("text", name.removeprefix("attention."), x=box.left + 8, y=y))
        shape = f"({shapes[name]})"
        parts.append(element("text", shape, x=box.left + WIDTH - 8, y=y, text_anchor="end", fill="#0072b2"))
    below = box.top + LINE * len(box.names) + 24
    return [*parts, element("text", box.said, x=box.left + 2, y=below, font_size=12, fill="#555")]


def arrow(*points: tuple[float, float]) -> list[str]:
    """Return a line whose last stretch runs to the right, with a head."""
    x, y = points[-1]
    line = element("polyline", points=" ".join(f"{a},{b}" for a, b in points), fill="none", stroke="#555")
    return [line, element("polygon", points=f"{x},{y} {x - 7},{y - 4} {x - 7},{y + 4}", fill="#555")]


def between(first: Box, second: Box) -> list[str]:
    """Return the arrow from a box to one in the next column."""
    start, end = first.left + WIDTH, second.left
    halfway = (start + end) / 2
    return arrow((start, first.middle), (halfway, first.middle), (halfway, second.middle), (end, second.middle))


def flow(source: float, firsts: Sequence[str], lasts: Sequence[str]) -> list[str]:
    """Return the ways of a token into boxes, and out of others into the sum.

    Args:
        source: how far down it comes in, and the sum stands.
        firsts, lasts: the boxes.
    """
    parts = [element("text", "x", x=FIRST - 44, y=source + 5, font_style="italic", font_size=16)]
    for name in firsts:
        box = BOXES[name]
        parts += arrow((FIRST - 30, source), (FIRST - 18, source), (FIRST - 18, box.middle), (box.left, box.middle))
    for name in lasts:
        box = BOXES[name]
        ends = [(box.left + WIDTH, box.middle), (END - 22, box.middle), (END - 22, source), (END - 9, source)]
        parts += arrow(*ends)
    parts.append(element("circle", cx=END, cy=source, r=9, fill="#fff", stroke="#555"))
    return [*parts, element("text", "+", x=END, y=source + 5, text_anchor="middle")]


def figure() -> str:
    """Return the drawing.

    Raises:
        AssertionError: a tensor of the file has no place in it, or one in it is not in the file.
    """
    shapes = layout()
    assert sorted(shapes) == sorted(name for box in BOXES.values() for name in box.names)
    parts = [element("text", title, x=20, y=top, font_weight="bold") for title, top in HEADS.items()]
    parts += flow(BOXES["down"].middle, ["router", "down", "shared in", "mix"], ["up", "shared gate", "vector"])
    parts += flow(BOXES["query"].middle, ["attention router", "kv", "query"], ["attention out"])
    for first, second in ARROWS:
        parts += between(BOXES[first], BOXES[second])
    parts += [part for box in BOXES.values() for part in box_of(box, shapes)]
    return drawing(parts, END + 25, 665)


if __name__ == "__main__":
    FIGURE.write_text(figure())
