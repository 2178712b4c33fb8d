"""The laws of plugins, and of both places of this one."""

import pytest
from arctic_plugins_offload.config import OffloadConfig
from arctic_plugins_offload.placement import OffloadPlacement

from arctic_plugins.testing import PlacementSuite, PluginSuite, TracedGpu


class TestPlugin(PluginSuite):
    plugin = "offload"
    options = [{}, {"to": "disk", "ratio": 0.6}]


class TestDisk(PlacementSuite):
    def make(self, directory):
        return OffloadPlacement(OffloadConfig(to="disk", path=str(directory)), directory)


class TestHostMemory(PlacementSuite):
    """Without a GPU, weights stay where they are."""

    def make(self, directory):
        return OffloadPlacement(OffloadConfig(), directory)

    test_memory_that_it_takes_over_is_released = None  # it is the memory to keep them in


class TestPinnedMemory(PlacementSuite):
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        gpu = TracedGpu()
        monkeypatch.setattr("arctic_plugins_offload.host.Gpu", lambda: gpu)
        yield
        assert not gpu.errors

    def make(self, directory):
        return OffloadPlacement(OffloadConfig(), directory)

    test_a_save_that_is_killed_does_no_harm = None  # a forked process does not have page-locked memory
