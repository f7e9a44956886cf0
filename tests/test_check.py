"""``rlroute check``: one router, by name or file, is held to every law, and what breaks one is named with its place."""

import os
import subprocess
import sys

import pytest

from rlroute.experiments.laws.contract import LAWS
from rlroute.registry import router_class, router_names
from tests import ROOT
from tests.commands import ran, refused, rlroute
from tests.conftest import HANG
from tests.policies import OF_A_RUN
from tests.test_include import SOURCE

FORWARD = "    def forward(self, x_TD, context):\n"
FAULTS = {
    "raises": (SOURCE.replace(FORWARD, f"{FORWARD}        self.nothing  # here\n"), "pairs", "AttributeError: "),
    "raises in __init__": (SOURCE.replace("config.std)", "config.typo)  # here"), "pairs", "AttributeError: "),
    "looks ahead": (SOURCE.replace("scores(x_TD)", "scores(x_TD + x_TD.roll(-1, 0))"), "causal", "What comes later in"),
    "claims": (SOURCE.replace('"gate"', '"gate", "load"'), "load_signal", "what learns from load does. [assert "),
    "draws": (
        SOURCE.replace("scores(x_TD)", "scores(x_TD + x_TD.clone().normal_())"),
        "evaluation",
        "is deterministic",
    ),
    "no meaning": (SOURCE.replace('    gate_meaning = "plain softmax"\n', ""), "attributes", "AttributeError: "),
    "float64 alone": (SOURCE.replace(".gather(1,", ".double().gather(1,"), "precision", "[assert "),
}
"""A router, the law that it breaks, and the reason."""


@pytest.fixture
def file(tmp_path, routers):
    return tmp_path / "plain.py"


def lines_of(done):
    return {line.split()[1]: line for line in done.out.splitlines() if line.startswith(("pass ", "FAIL ", "refused "))}


def test_a_sound_router_passes_every_law_in_each_configuration(file):
    file.write_text(SOURCE)
    head, *verdicts, end = ran("check", file).splitlines()
    assert head == f"plain ({file})" and all(line.startswith("pass ") for line in verdicts)
    assert [line.split()[1] for line in verdicts] == [law.__name__.removeprefix("law_") for law in LAWS]
    assert (
        end == f"{len(LAWS)} pass in 4 configurations"
    )  # with terms, of decisions and of weights, and a balance that is held


@pytest.mark.parametrize("kind", FAULTS)
def test_a_broken_router_is_named_with_the_law_the_reason_and_the_place(kind, file):
    source, law, reason = FAULTS[kind]
    file.write_text(source)
    done = rlroute("check", file)
    line = lines_of(done)[law]
    assert done.code == 1 and line.startswith("FAIL ") and "plain: " in line and reason in line, done.out
    here = [number for number, text in enumerate(source.splitlines(), 1) if text.endswith("# here")]
    assert f"{file}, line {here[0]}" in line if here else "contract.py, line " in line
    assert len(lines_of(done)) == len(LAWS), "the other laws are tried as well"


def refusing(rule):
    head = "    @classmethod\n    def refuses(cls, config, shape):\n"
    body = f"{head}        return super().refuses(config, shape) or {rule}\n\n"
    return SOURCE.replace("    def __init__", f"{body}    def __init__")


def test_shapes_are_those_that_it_takes(file):
    file.write_text(refusing("(None if (shape.num_experts, shape.k) == (5, 3) else 'want 5 experts and k = 3')"))
    assert f"{len(LAWS)} pass" in ran("check", file)
    file.write_text(refusing("'nothing fits'"))
    sys.modules.pop("rlroute_included.plain")
    assert "refuses all shapes that are tried: nothing fits" in refused(rlroute("check", file))


def test_a_law_that_wants_another_shape_is_refused_and_fails_nothing(file):
    file.write_text(refusing("('no devices' if shape.devices > 1 else None)"))
    done = rlroute("check", file)
    assert done.code == 0 and lines_of(done)["surroundings"].startswith("refused ") and "no devices" in done.out
    assert done.out.splitlines()[-1] == f"{len(LAWS) - 1} pass, 1 refused in 4 configurations"


@pytest.mark.parametrize("name", ["hash", "noisy_topk", "switch:balance_weight=0.5"])
def test_ours_pass_by_name(name):
    assert f"{len(LAWS)} pass" in ran("check", name)


@pytest.mark.parametrize(
    ("router", "said"),
    [
        ("dense", "no router"),
        ("swich", "did you mean 'switch'"),
        ("sb3", "needs policy"),
        ("no/such.py", "no such file"),
    ],
)
def test_what_cannot_be_checked_is_refused(router, said, routers):
    assert said in refused(rlroute("check", router))


@pytest.mark.processes
@pytest.mark.slow
def test_without_assertions_nothing_is_claimed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-O", "-m", "rlroute", "check", "hash"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 2 and "python -O leaves out" in done.stderr


def test_laws_need_no_pytest():
    """An installed rlroute has them."""
    laws = {name: module for name, module in sys.modules.items() if name.startswith("rlroute.experiments.laws")}
    assert laws and not any("pytest" in vars(module) for module in laws.values())
    assert set(OF_A_RUN) < set(router_names()) and router_class("hash").Config.name == "hash"
