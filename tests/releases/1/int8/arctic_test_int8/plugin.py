"""A codec, a placement on disk, a mixin and every hook, by somebody who knows only the contract."""

from typing import Annotated

from arctic_plugins import THIS_MACHINE, Claim, Finding, Plugin, PluginConfig, UserError, hookimpl


class Int8Config(PluginConfig):
    include: tuple[str, ...] = ("**.self_attn.*",)
    """Patterns of the modules to encode."""
    spool: Annotated[str | None, THIS_MACHINE] = None
    """A directory: the encoded bytes live there and are mapped when they are used."""
    refuse: bool = False
    """Refuse every model."""
    log_to: str | None = None
    """A file to which the number of each step is written."""


class Int8(Plugin):
    name = "int8"
    config = Int8Config
    slots = frozenset({"weight_codec", "placement"})
    contracts = frozenset({1})
    hosts = {"transformers": ">=5"}
    before = frozenset({"adapter"})
    trainer_mixins = ("arctic_test_int8.training:NotesPlugin",)

    @classmethod
    @hookimpl
    def register(cls, registry):
        registry.codec("test-int8", "arctic_test_int8.codec:Int8Codec")

    @classmethod
    @hookimpl
    def diagnose(cls):
        return [Finding("ok", "spool", "any directory will do")]

    @hookimpl
    def validate(self, stack, model_config, hardware):
        if self.options.refuse:
            raise UserError(f"int8 refuses {model_config.model_type} on {hardware}")
        return [f"{len(stack)} plugins on {hardware}"]

    @hookimpl
    def claim(self, model_config, modules):
        from arctic_test_int8.codec import Int8Codec, Spool

        claims = [Claim("weight_codec", pattern, Int8Codec()) for pattern in self.options.include]
        if self.options.spool:
            spool = Spool(self.options.spool)
            claims += [Claim("placement", pattern, spool) for pattern in self.options.include]
        return claims

    @hookimpl
    def hf_configure_model(self, config):
        config.int8_was_here = True

    @hookimpl
    def hf_transform_model(self, model):
        model.int8_was_here = True
        return model

    @hookimpl
    def hf_training_arguments(self, args):
        args.logging_steps = 1

    @hookimpl
    def hf_attach_trainer(self, trainer):
        from arctic_test_int8.training import StepCounter

        trainer.add_callback(StepCounter(self.options.log_to))

    @hookimpl
    def vllm_engine_args(self, checkpoint):
        return {"seed": 0} if checkpoint else None
