"""A stack is made of what the user enabled: every way in which that can go wrong is one line that says what to do."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_plugins import Plugin, PluginConfig, Stack
from arctic_plugins.errors import (
    ConfigError,
    HostVersionError,
    PluginError,
    PluginLoadError,
    PluginNotFoundError,
    ResolveError,
)
from arctic_plugins.resolver import resolve
from arctic_plugins.testing import run_python

MINIMAL = """
from arctic_plugins import Plugin
class plugin(Plugin):
    name = "{name}"
    {body}
"""


def minimal(name, body="pass"):
    return MINIMAL.format(name=name, body=body)


def test_unknown_plugin_suggests_the_nearest_name():
    with pytest.raises(PluginNotFoundError, match="plugin 'fp9' is not installed; did you mean 'fp8'"):
        Stack.from_dict({"fp9": {}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit": 8}, r"plugins\.fp8\.bit is not an option; did you mean 'bits'"),
        ({"bits": 7}, r"plugins\.fp8\.bits is 7; expected 6, 8 or 12"),
        ({"group_size": 3}, r"plugins\.fp8\.group_size.* is 3"),
        ({"include": 5}, r"plugins\.fp8\.include is 5; expected a valid tuple"),
        (3, r"plugins\.fp8 is 3; expected a mapping"),
    ],
)
def test_bad_options_name_the_key(options, message):
    with pytest.raises(ConfigError, match=message):
        Stack.from_dict({"fp8": options})


def test_plugins_must_be_a_mapping():
    with pytest.raises(ConfigError, match="plugins is \\['fp8'\\]; expected a mapping"):
        Stack.from_dict(["fp8"])


def test_broken_plugin_fails_only_when_enabled(install_plugin):
    install_plugin("broken", "import a_module_that_is_not_there")
    assert "fp8" in Stack.from_dict({"fp8": {}})
    with pytest.raises(
        PluginLoadError,
        match=r"plugin 'broken' of distribution broken-dist 1.0 cannot be imported: ModuleNotFoundError: .*a_module",
    ):
        Stack.from_dict({"broken": {}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("plugin = 3", "is not a plugin"),
        (minimal("other"), "has the name 'other'"),
        (minimal("odd", "slots = frozenset({'weight_codecs'})"), "unknown slots .*did you mean 'weight_codec'"),
        (minimal("odd", "config = dict"), "is not a subclass of arctic_plugins.PluginConfig"),
        (
            (
                "from arctic_plugins import Plugin, hookimpl\nclass plugin(Plugin):\n    name = 'odd'\n"
                "    @hookimpl\n   "
                " def claim(self, nonsense): ..."
            ),
            "(?s)nonsense",
        ),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_named(install_plugin, source, message):
    install_plugin("odd", source)
    with pytest.raises(PluginLoadError, match=message) as error:
        Stack.from_dict({"odd": {}})
    assert "odd-dist" in str(error.value)


@pytest.mark.parametrize("option", ["tryfirst", "trylast", "wrapper", "hookwrapper", "optionalhook"])
def test_options_of_pluggy_that_would_be_ignored_are_refused(install_plugin, option):
    hook = f"    @hookimpl({option}=True)\n    def hf_training_arguments(self, args): yield"
    install_plugin(
        "odd", f"from arctic_plugins import Plugin, hookimpl\nclass plugin(Plugin):\n    name = 'odd'\n{hook}"
    )
    with pytest.raises(
        PluginLoadError,
        match=f"marks hf_training_arguments with {option}, which is not supported; set 'before' and 'after'",
    ):
        Stack.from_dict({"odd": {}})


def test_a_hook_that_does_not_exist_is_refused(install_plugin):
    source = (
        "from arctic_plugins import Plugin, hookimpl\nclass plugin(Plugin):\n    name = 'odd'\n    @hookimpl\n  "
        "  def clam(self): ..."
    )
    install_plugin("odd", source)
    with pytest.raises(PluginError, match="clam"):
        Stack.from_dict({"odd": {}})


def test_two_distributions_with_one_name_are_an_error(install_plugin):
    install_plugin("twin", minimal("twin"), distribution="first", module="first_twin")
    install_plugin("twin", minimal("twin"), distribution="second", module="second_twin")
    with pytest.raises(PluginError, match="'twin' is provided by (first|second) 1.0 and (first|second) 1.0"):
        Stack.from_dict({"twin": {}})


def make(name, **attributes):
    sets = {
        key: frozenset(value) if isinstance(value, (list, set, tuple)) else value for key, value in attributes.items()
    }
    return type(name, (Plugin,), {"name": name, **sets})(PluginConfig())


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ([make("a", requires={"b"})], "plugin 'a' requires 'b', which is not in the stack"),
        (
            [make("a", requires={"weight_codec"}), make("b", slots={"adapter"})],
            "requires a plugin that fills 'weight_codec'",
        ),
        ([make("a", conflicts={"b"}), make("b")], "'a' and 'b' conflict"),
        ([make("a", conflicts={"rope"}), make("b", slots={"rope"})], "'a' and 'b' conflict"),
        ([make("a", slots={"rope"}), make("b", slots={"rope"})], "'a' and 'b' both fill the slot 'rope'"),
        ([make("a", after={"b"}), make("b", after={"a"})], "cycle: "),
    ],
)
def test_what_does_not_make_a_stack(plugins, message):
    with pytest.raises(ResolveError, match=message):
        resolve(plugins)


@pytest.mark.parametrize("wanted", ["<1", ">=99"])
def test_host_out_of_range_is_known_before_loading(wanted):
    plugin = make("old", hosts={"transformers": wanted})
    with pytest.raises(
        HostVersionError, match=r"plugin 'old' does not work with transformers \d.*pip install 'transformers"
    ):
        Stack((plugin,)).check_host("transformers")


def test_order_by_slot_then_by_name():
    plugins = [
        make("z", slots={"weight_codec"}),
        make("a", after={"weight_codec"}),
        make("m", before={"weight_codec"}),
        make("b"),
    ]
    assert [plugin.name for plugin in resolve(plugins)] == ["b", "m", "z", "a"]


names = st.sampled_from("abcdef")


@settings(max_examples=100, deadline=None)
@given(edges=st.lists(st.tuples(names, names), max_size=8), shuffle=st.randoms(use_true_random=False))
def test_order_keeps_every_wish_and_does_not_depend_on_how_it_was_written(edges, shuffle):
    after = {name: {b for a, b in edges if a == name and b < name} for name in "abcdef"}  # never a cycle
    plugins = [make(name, after=after[name]) for name in "abcdef"]
    order = [plugin.name for plugin in resolve(plugins)]
    assert all(order.index(earlier) < order.index(name) for name in after for earlier in after[name])
    shuffle.shuffle(plugins)
    assert [plugin.name for plugin in resolve(plugins)] == order


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-600, 600) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(["bits", "group_size", "include", "exclude", "r", "alpha", "x"])


@settings(max_examples=200, deadline=None)
@given(options=st.dictionaries(keys, json_values, max_size=3))
def test_any_options_either_work_or_are_one_line(options):
    try:
        stack = Stack.from_dict({"fp8": options})
    except ConfigError as error:
        assert "plugins.fp8" in str(error)
        assert "\n" not in str(error)
    else:
        assert Stack.from_dict(json.loads(json.dumps(stack.to_dict()))).sha256() == stack.sha256()


def test_canonical_form_does_not_depend_on_order_or_defaults():
    one, two = Stack.from_dict({"lora": {}, "fp8": {"bits": 8}}), Stack.from_dict({"fp8": None, "lora": {"r": 16}})
    assert one.to_dict() == two.to_dict()
    assert one.sha256() == two.sha256() != Stack.from_dict({"fp8": {}}).sha256()
    assert {(setting.plugin, setting.key): setting.source for setting in one.settings()}["fp8", "bits"] == "recipe"
    assert {(setting.plugin, setting.key): setting.source for setting in two.settings()}["fp8", "bits"] == "default"


def test_engine_arguments_that_differ_name_both_plugins(install_plugin, tmp_path):
    for name, value in (("one", 1), ("two", 2)):
        install_plugin(
            name,
            f"""
            from arctic_plugins import Plugin, hookimpl
            class plugin(Plugin):
                name = "{name}"
                @hookimpl
                def vllm_engine_args(self, checkpoint):
                    return {{"max_model_len": {value}}}
            """,
        )
    with pytest.raises(PluginError, match="'one' and 'two' set the engine argument 'max_model_len' to 1 and 2"):
        Stack.from_dict({"one": {}, "two": {}}).vllm_engine_args(tmp_path)


def test_an_exception_in_a_hook_names_plugin_and_hook(install_plugin, tmp_path):
    source = """
    from arctic_plugins import Plugin, hookimpl
    class plugin(Plugin):
        name = "boom"
        @hookimpl
        def vllm_engine_args(self, checkpoint):
            raise ValueError("bang")
    """
    install_plugin("boom", source)
    with pytest.raises(PluginError, match="plugin 'boom' failed in vllm_engine_args: ValueError: bang"):
        Stack.from_dict({"boom": {}}).vllm_engine_args(tmp_path)


def test_importing_the_core_loads_nothing_heavy():
    heavy = ("torch", "transformers", "vllm", "peft")
    code = (
        f"import sys, arctic_plugins; arctic_plugins.Stack.from_dict({{'fp8': {{}}, 'lora': {{}}}}); print([m for "
        f"m in {heavy} if m in sys.modules])"
    )
    assert run_python("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "a mapping"), (None, "does not exist")]
)
def test_recipe_files_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Stack.from_file(path)
