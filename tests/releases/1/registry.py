"""A plugin that registers something of every kind, and a function that finds it all again."""

from typing import Annotated

from pydantic import Field

from arctic_plugins import THIS_MACHINE, ModelClasses, Plugin, PluginConfig, hookimpl

HERE = __name__


class Options(PluginConfig):
    """Old runs, converted to new ones.

    This paragraph is not shown.
    """

    path: Annotated[str | None, THIS_MACHINE] = None
    """Where it is."""
    size: Annotated[int, Field(gt=0)] = 8
    """How large it is."""


class plugin(Plugin):  # noqa: N801
    """Everything that can be registered."""

    name = "everything"
    config = Options
    slots = frozenset({"rope"})
    contracts = frozenset({1})
    hosts = {"transformers": ">=5"}
    requires = frozenset()
    conflicts = frozenset({"attention"})
    after = frozenset({"weight_codec"})
    before = frozenset({"adapter"})

    @property
    def trainer_mixins(self):
        return (f"{HERE}:Mixin",)

    @property
    def row_processes(self):
        return 1

    @hookimpl
    def validate(self):
        self.check_processes("size")

    @classmethod
    @hookimpl
    def register(cls, registry):
        registry.model(
            "old-model",
            ModelClasses(
                config=f"{HERE}:Part",
                base=f"{HERE}:Part",
                causal_lm=f"{HERE}:Part",
                vllm=f"{HERE}:Part",
                tokenizer=f"{HERE}:Part",
                heads={"AutoModelForSequenceClassification": f"{HERE}:Part"},
            ),
        )
        registry.codec("old-codec", f"{HERE}:Part")
        registry.experts_function("old-experts", f"{HERE}:part")
        registry.rope_type("old-rope", f"{HERE}:part")
        registry.widening_linear(f"{HERE}:part")
        registry.exporter("old-format", f"{HERE}:Part")
        registry.converter("old-weights", f"{HERE}:Part")
        registry.importer("old-run", f"{HERE}:part", Options)
        registry.trainer_engine("old-engine", f"{HERE}:Part")
        registry.host_launcher(f"{HERE}:part")
        registry.environment(f"{HERE}:environment")


class Mixin:
    pass


class Part:
    pass


def part():
    return 1


def environment():
    return {"OLD_VARIABLE": "1"}


def check(registry):
    assert registry.failures == {}
    assert registry.plugins == []
    assert registry.models["old-model"].tokenizer == f"{HERE}:Part"
    assert "old-codec" in registry.codec_types()
    assert registry.load_codec("old-codec") is Part
    assert registry.experts_functions() == {"old-experts": part}
    assert registry.rope_types() == ["old-rope"]
    assert registry.load_rope_type("old-rope") is part
    assert registry.load_widening_linear() == 1
    assert registry.exporter_names() == ["old-format"]
    assert registry.load_exporter("old-format") is Part
    assert registry.converter_names() == ["old-weights"]
    assert registry.load_converter("old-weights") is Part
    assert registry.importers["old-run"].options is Options
    assert registry.importers["old-run"].target == f"{HERE}:part"
    registry.check_convertible("old-weights")
    registry.check_convertible("old-run")
    assert registry.trainer_engines() == ["old-engine"]
    registry.check_trainer_engine("old-engine")
    assert registry.load_trainer_engine("old-engine") is Part
    assert registry.load_host_launcher() is part
    assert registry.load_environment() == {"OLD_VARIABLE": "1"}
