"""The laws of plugins and of placements, and a story of a user."""

import torch
from arctic_plugins import Stack
from arctic_plugins.testing import PlacementSuite, PluginSuite
from arctic_plugins_huggingface import load_model

from arctic_acme_0_1_placement.placement import Acme01PlacementPlacement


class TestPlugin(PluginSuite):
    plugin = "acme-0-1-placement"
    options = [{}, {"select": ("**.mlp.*",)}]


class TestPlacement(PlacementSuite):
    def make(self, directory):
        return Acme01PlacementPlacement(directory)


def test_a_model_computes_the_same_from_files_which_are_removed_with_it(tiny_checkpoint, tmp_path):
    ids = torch.arange(10, 30)[None]
    plain, _ = load_model(tiny_checkpoint)
    placed, _ = load_model(tiny_checkpoint, Stack.from_dict({"acme-0-1-placement": {"path": str(tmp_path)}}))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 14, "seven weights in each of two layers"
    with torch.no_grad():
        assert torch.equal(placed(ids).logits, plain(ids).logits)
    del placed
    assert not list(tmp_path.rglob("*.safetensors"))
