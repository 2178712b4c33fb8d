"""The laws of plugins and of dispatches, and a story of a user."""

from pathlib import Path

from arctic_plugins.testing import MIXTURES, DispatchSuite, PluginSuite, run_processes, said

from arctic_acme_0_1_dispatch.dispatch import Acme01DispatchDispatch


class TestPlugin(PluginSuite):
    plugin = "acme-0-1-dispatch"
    model = MIXTURES["mixtral"]


class TestDispatch(DispatchSuite):
    """In one process."""

    dispatches = [Acme01DispatchDispatch(1)]


def test_two_processes_share_the_experts_and_compute_the_same(tiny_models):
    model_type, config = MIXTURES["mixtral"]
    found = said(run_processes(Path(__file__).with_name("processes.py"), 2, tiny_models(model_type, **config)))
    assert [one["experts"] for one in found] == [2, 2], "of four"
    assert all(one["difference"] < 1e-4 for one in found)
