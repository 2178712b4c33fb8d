"""The contract: what it consists of is dated, plugins may require a version of it, and nothing leaves it silently."""

import ast
import importlib
import inspect
import re
import warnings
from importlib.metadata import version
from textwrap import dedent

import pluggy
import pytest
from packaging.version import Version
from typing_extensions import deprecated

import arctic_plugins
from arctic_plugins import CONTRACT, ArcticDeprecationWarning, Plugin, Registry, Stack, discovery, hookspecs
from arctic_plugins.cli import main
from arctic_plugins.diagnosis import _check_plugin
from arctic_plugins.discovery import load_plugin, process_registry
from arctic_plugins.errors import PluginLoadError

CLASSES = {
    "arctic_plugins": ["Plugin", "PluginConfig", "Registry"],
    "arctic_plugins.frozen": [
        "Codec",
        "Converter",
        "DispatchedTokens",
        "ExpertsDispatch",
        "Exporter",
        "FetchedHandle",
        "Handle",
        "Placement",
    ],
    "arctic_plugins_huggingface.training": ["TrainerEngine"],
}
"""Classes that authors of plugins extend or call."""


def members(cls):
    """Name -> docstring of what ``cls`` defines publicly, except what only overrides a base class."""
    inherited = {name for base in cls.__mro__[1:] if base.__module__.startswith("arctic_") for name in vars(base)}
    [tree] = ast.parse(dedent(inspect.getsource(cls))).body
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef):
            name, text = node.name, ast.get_docstring(node)
        elif isinstance(node, ast.AnnAssign):
            below = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            name, text = ast.unparse(node.target), following.value.value if below else None
        else:
            continue
        if not name.startswith("_") and name not in inherited:
            yield f"{cls.__name__}.{name}", text or ""


PARTS = {
    **{f"hook {name}": hook.__doc__ for name, hook in vars(hookspecs).items() if hasattr(hook, "arctic_plugins_spec")},
    **{
        name: text
        for module, classes in CLASSES.items()
        for cls in classes
        for name, text in members(getattr(importlib.import_module(module), cls))
    },
}


def test_every_part_of_the_contract_is_found():
    assert {"hook claim", "Plugin.slots", "Plugin.options", "Registry.codec", "Codec.linear"} <= PARTS.keys()


def test_every_part_says_since_when():
    since = {part: re.search(r"^\s*\.\. versionadded:: (\S+)$", text, re.MULTILINE) for part, text in PARTS.items()}
    here = version("arctic-plugins")
    assert not [part for part, found in since.items() if found is None], f"add '.. versionadded:: {here}'"
    assert not [part for part, found in since.items() if found and Version(found[1]) > Version(here)], "of the future"


CORE = f"arctic-plugins {version('arctic-plugins')} has contract {CONTRACT}"


def plugin(body="", name="kit"):
    """The source of a plugin with ``body`` in its class."""
    return f"from arctic_plugins import Plugin, hookimpl\nclass plugin(Plugin):\n    name = '{name}'\n" + "".join(
        f"    {line}\n" for line in dedent(body).splitlines()
    )


@pytest.mark.parametrize(
    ("contracts", "message"),
    [
        ({CONTRACT}, None),
        ({CONTRACT, CONTRACT + 1}, None),
        (set(), None),
        (
            {CONTRACT + 1, CONTRACT + 2},
            f"needs contract {CONTRACT + 1} or {CONTRACT + 2}, but {CORE}; run 'pip install --upgrade arctic-plugins'",
        ),
        (
            {CONTRACT - 1},
            f"needs contract {CONTRACT - 1}, but {CORE}; run 'pip install --upgrade kit-dist'",
        ),
        ({"1"}, "has contracts {'1'}, which is not a set of integers, such as {1}"),
        (1, "has contracts 1, which is not a set of integers, such as {1}"),
    ],
)
def test_a_plugin_may_require_a_contract(install_plugin, capsys, contracts, message):
    install_plugin("kit", plugin(f"contracts = {contracts!r}"))
    if message is None:
        assert load_plugin("kit").contracts == contracts
        return
    with pytest.raises(PluginLoadError) as raised:
        Stack.from_dict({"kit": {}})
    assert f"plugin 'kit' of distribution kit-dist 1.0 {message}" in str(raised.value)
    assert str(process_registry().failures["kit"]) == str(raised.value), "workers say it when something is missing"
    with pytest.raises(SystemExit) as ended:
        main(["plugins"])
    assert ended.value.code == 0
    assert f"broken: {raised.value}" in capsys.readouterr().out


def test_a_newer_contract_is_named_before_what_else_does_not_fit(install_plugin):
    install_plugin("kit", plugin(f"contracts = {{{CONTRACT + 1}}}\nslots = {{'a-slot-of-tomorrow'}}"))
    with pytest.raises(PluginLoadError, match="needs contract"):
        load_plugin("kit")


def test_a_plugin_that_calls_what_is_gone_harms_no_other(install_plugin):
    install_plugin(
        "kit", plugin("@classmethod\n@hookimpl\ndef register(cls, registry):\n    registry.kodec('old', 'old:Old')")
    )
    registry = process_registry()
    assert {"fp8", "lora"} <= {*registry.plugins}
    assert "kit" not in registry.plugins
    assert (
        "plugin 'kit' of distribution kit-dist 1.0 failed in register: AttributeError: 'Registry' object has no"
        in str(registry.failures["kit"])
    )


DATED = """
from arctic_plugins import Plugin, PluginConfig

class Options(PluginConfig):
    size: int = 8
    '''How ``large`` a :class:`~some.where.Thing` is.

    .. versionadded:: 0.1
    '''

class plugin(Plugin):
    '''Things.

    .. versionadded:: 0.1
    '''
    name, config, contracts = "kit", Options, {CONTRACT}
"""


def test_the_command_shows_the_contract_and_plain_text(install_plugin, capsys):
    install_plugin("kit", DATED.replace("{CONTRACT}", f"{{{CONTRACT}}}"))
    with pytest.raises(SystemExit):
        main(["plugins", "kit"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"kit: Things.\nSlots: none\nContract: {CONTRACT}\n")
    assert shown.endswith("How large a Thing is.\n")


# Deprecation: nothing is deprecated today, so the tests deprecate something.

HOOK = "the hook 'old_claim' is deprecated since arctic-plugins 0.1; implement 'claim'"
ARGUMENT = "the argument 'hardware' of 'old_validate' is deprecated since arctic-plugins 0.1; read 'stack'"
METHOD = "Registry.kodec is deprecated since arctic-plugins 0.1; call Registry.codec"
OLD = """
@classmethod
@hookimpl
def register(cls, registry):
    registry.kodec("old", "old_codecs:Old")

@hookimpl
def old_claim(self, modules):
    return []

@hookimpl
def old_validate(self, hardware):
    return [hardware]
"""


@pytest.fixture
def tomorrow(monkeypatch):
    """The contract of a release that has deprecated a hook, an argument of a hook and a method."""

    def old_claim(modules):
        """Claim modules."""

    def old_validate(stack, hardware):
        """Check the stack."""

    @deprecated(METHOD, category=ArcticDeprecationWarning)
    def kodec(self, type_name, target):
        self.codec(type_name, target)

    marker = pluggy.HookspecMarker(discovery.PROJECT)
    for spec in (
        marker(warn_on_impl=ArcticDeprecationWarning(HOOK))(old_claim),
        marker(warn_on_impl_args={"hardware": ArcticDeprecationWarning(ARGUMENT)})(old_validate),
    ):
        monkeypatch.setattr(hookspecs, spec.__name__, spec, raising=False)
    monkeypatch.setattr(Registry, "kodec", kodec, raising=False)


def test_what_is_deprecated_works_and_warns_where_the_author_uses_it(tomorrow, install_plugin):
    site = install_plugin("kit", plugin(OLD))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ArcticDeprecationWarning)
        stack = Stack.from_dict({"kit": {}})
        assert "old" in process_registry().codec_types()
        assert [result for _, result in stack._each("old_validate", stack=stack, hardware="cpu")] == [["cpu"]]
    assert {str(each.message) for each in caught} == {HOOK, ARGUMENT, METHOD}
    assert {each.filename for each in caught} == {str(site / "kit_plugin.py")}


def test_doctor_shows_what_a_plugin_uses(tomorrow, install_plugin):
    install_plugin("kit", plugin(OLD))
    found = {finding.text: finding for finding in _check_plugin("kit") if finding.status == "warning"}
    assert {text.partition(": ")[2] for text in found} == {HOOK, ARGUMENT, METHOD}
    assert {finding.subject for finding in found.values()} == {"plugin kit"}
    assert {finding.fix for finding in found.values()} == {"upgrade kit-dist, or report it to its authors"}


def test_names_are_those_of_the_faces():
    assert arctic_plugins.CONTRACT is CONTRACT
    assert Plugin.contracts == frozenset()
