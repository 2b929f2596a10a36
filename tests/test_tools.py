"""Small tools: runs with a router of one's own, intervals, packages that are missing."""

import sys

import pytest
import torch
from scipy import stats

from lab.tools import cli, runs, statistics
from moe import MoEConfig, MoETransformer, Router

SIGMOID = """
from moe import Router, wide
import torch.nn.functional as F

class Sigmoid(Router):
    def scores(self, x):
        logits = wide(F.linear(x, self.weight))
        return logits, logits.sigmoid()
"""


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder with sigmoid_router.py and a run that was trained with it -> the run, its model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sigmoid_router.py").write_text(SIGMOID, encoding="utf-8")
    model = MoETransformer(MoEConfig(), router=runs.router_class("sigmoid_router:Sigmoid"))
    settings = {"model": vars(model.config), "train": {"router": "sigmoid_router:Sigmoid"}}
    optimizer = torch.optim.AdamW(model.parameters())
    runs.save(tmp_path / "run", model, optimizer, 0, settings, [], [])
    yield tmp_path / "run", model
    sys.modules.pop("sigmoid_router", None)


def test_a_run_opens_with_its_own_router(saved):
    """Named again, the router of a run computes what it did in training."""
    folder, model = saved
    router = runs.router_class("sigmoid_router:Sigmoid")
    loaded, train = runs.load(folder, router)
    tokens = torch.randint(0, 48, (2, 8))
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    assert all(type(module) is router for module in loaded.routers())
    assert train["router"] == "sigmoid_router:Sigmoid"


def test_opening_a_run_executes_no_code(saved):
    """A router of one's own is asked for, never imported; and refused where a run has none."""
    folder, model = saved
    with pytest.raises(ValueError, match="name it again, with --router sigmoid_router:Sigmoid"):
        runs.load(folder)
    settings = runs.read_settings(folder)
    settings["train"].pop("router")
    runs.save(folder, model, torch.optim.AdamW(model.parameters()), 0, settings, [], [])
    with pytest.raises(ValueError, match=r"trained with the router of moe\.py; leave --router out"):
        runs.load(folder, Router)


WRONG_ROUTERS = {
    "no colon": ("sigmoid_router", "expected FILE:CLASS"),
    "no file": ("nowhere:Sigmoid", "nowhere cannot be imported: No module named 'nowhere'"),
    "no class": ("sigmoid_router:Sigmoi", "has no Sigmoi; did you mean Sigmoid?"),
    "no router": ("sigmoid_router:wide", "wide is no subclass of moe.Router"),
}


@pytest.mark.parametrize(("name", "message"), WRONG_ROUTERS.values(), ids=WRONG_ROUTERS)
def test_wrong_routers(saved, name, message):
    """A router that cannot be had is told in one line."""
    with pytest.raises(ValueError) as error:
        runs.router_class(name)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("right", [0, 3, 20])
def test_share_interval_is_wilsons(right):
    """The formula of the share's interval agrees with scipy's."""
    expected = stats.binomtest(right, 20).proportion_ci(method="wilson")
    assert statistics.share_interval(right, 20) == pytest.approx((expected.low, expected.high))


def test_bootstrap_of_one_value_each():
    """Where all values are alike, nothing is left to chance; seeds count as one each."""
    values = [torch.ones(4).numpy(), 3 * torch.ones(8).numpy()]
    low, high = statistics.bootstrap(values, [[0, 0, 1, 1], range(8)])
    assert (low, high) == (1, 3)  # both seeds, or one of them twice


def test_without_scipy(monkeypatch):
    """Without scipy, one line says how to install it; the main job's bootstrap does not need it."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"need scipy: pip install -e \"\.\[lab\]\""):
        statistics.interval([1.0, 2.0])
    low, high = statistics.bootstrap([torch.rand(9).numpy()], [range(9)])
    assert low < high


def test_wrong_flags_get_a_hint():
    """An unknown flag is answered with the nearest that there is, in a group or not."""
    parser = cli.Parser("tool")
    cli.add_flags(parser, MoEConfig)
    with pytest.raises(cli.Usage, match=r"unknown flag --topk; did you mean --top-k\?"):
        parser.parse(["--topk", "3"])
    assert parser.parse(["--dense-layers", "0,2", "--n-kv-heads", "none", "--no-tied"]) == {
        "dense_layers": (0, 2),
        "n_kv_heads": None,
        "tied": False,
    }
