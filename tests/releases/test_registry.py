"""What plugins of earlier releases register is found again."""

import sys
from pathlib import Path

import pytest

from arctic_plugins import Registry, Stack
from arctic_plugins.discovery import load_plugin, new_plugin_manager

SOURCES = sorted(Path(__file__).parent.glob("*/registry.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_everything_is_registered_as_before(source, install_plugin):
    install_plugin("everything", source.read_text())
    registry, manager = Registry(), new_plugin_manager(only=("register",))
    manager.register(load_plugin("everything"))
    manager.hook.register(registry=registry)
    sys.modules["everything_plugin"].check(registry)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_its_attributes_mean_what_they_meant(source, install_plugin):
    install_plugin("everything", source.read_text())
    stack = Stack.from_dict({"lora": {}, "everything": {"path": "here", "size": 1}, "fp8": {}})
    assert [plugin.name for plugin in stack] == ["fp8", "everything", "lora"]
    assert "everything_plugin:Mixin" in [target for target, _ in stack.trainer_mixins()]
    assert stack.validate(None, "cpu") == []
    assert {plugin.name: plugin.options for plugin in stack.anywhere()}["everything"].path is None
