"""``arctic convert``. Installed plugins provide the formats and the options of each format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from arctic_plugins_huggingface.cli import quiet_hosts, trust_option

if TYPE_CHECKING:
    from arctic_plugins.plugin import PluginConfig
    from arctic_plugins.registry import Registry

__all__ = ["convert"]


class _Convert(click.Command):
    """Command with the options of every importer, and a help text that lists the formats."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if __name__ not in ctx.meta:  # click calls this several times, and needs the same objects
            ctx.meta[__name__] = _options()
        *own, help_option = super().get_params(ctx)
        return [*own, *ctx.meta[__name__], help_option]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:  # if it belongs to a format whose plugin is not installed, report that
            ctx.ignore_unknown_options = True
            values, _, _ = self.make_parser(ctx).parse_args(given)
            if format_name := values.get("format_name"):
                _registry().check_convertible(format_name)
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        registry = _registry()
        meanings = dict.fromkeys(registry.converter_names(), "A quantized model. OUT is an encoded one.")
        meanings |= {name: importer.meaning for name, importer in registry.importers.items()}
        if meanings:
            with formatter.section("Formats"):
                formatter.write_dl(sorted(meanings.items()))
        super().format_options(ctx, formatter)


@click.command(cls=_Convert, short_help="Convert another library's checkpoint: a quantized model, or a training run.")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--from", "format_name", required=True, help="Format of CHECKPOINT, one of those above.")
@trust_option
def convert(checkpoint: str, out: str, format_name: str, trust_remote_code: bool, **given: Any) -> None:
    """Convert CHECKPOINT (a directory) from another library's format and write the result to OUT.

    \b
    Example:
      arctic convert snowflake-arctic-fp8 arctic-fp8 --from deepspeedfp
      arctic convert old-run/global_step100 adapter --from deepspeed --base meta-llama/Llama-3.1-8B
    """
    from arctic_plugins.registry import load

    registry = _registry()
    options = _chosen(format_name, {name: value for name, value in given.items() if value is not None})
    registry.check_convertible(format_name)
    from arctic_plugins_huggingface.checkpoints.export import convert_checkpoint

    quiet_hosts()
    if options is not None:
        lines = load(registry.importers[format_name].target)(checkpoint, out, options)
    else:
        lines = convert_checkpoint(checkpoint, out, format_name, trust_remote_code=trust_remote_code)
    for line in lines:
        click.echo(line)
    click.echo(f"saved in {out}")


def _registry() -> Registry:
    from arctic_plugins.discovery import process_registry

    return process_registry()


def _options() -> list[click.Parameter]:
    """Return the options of all importers; an option that several importers have appears once."""
    from arctic_plugins.prose import paragraphs

    fields: dict[str, list[tuple[str, Any]]] = {}
    for format_name, importer in sorted(_registry().importers.items()):
        for name, field in importer.options.model_fields.items():
            fields.setdefault(name, []).append((format_name, field))
    found: list[click.Parameter] = []
    for name, owners in fields.items():
        texts = [f"{format_name}: {' '.join(paragraphs(field.description))}" for format_name, field in owners]
        # Whatever value click parses, the options of the chosen importer validate it.
        kind = _kind(owners[0][1].annotation) if len(owners) == 1 else str
        found.append(
            click.Option(
                [_flag(name)], type=kind, is_flag=kind is bool, default=None, help=" ".join(" ".join(texts).split())
            )
        )
    return found


def _kind(annotation: Any) -> Any:
    """Return click's type for a field: the field's own type if it is a simple one, a choice, or else a string."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, float, int) else str


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _chosen(format_name: str, given: Mapping[str, Any]) -> PluginConfig | None:
    """Return the options of the importer ``format_name``; None if there is no such importer.

    Raises:
        ConfigError: an option of another importer is given, or a value is refused.
    """
    from pydantic import ValidationError

    from arctic_plugins.errors import ConfigError
    from arctic_plugins.plugin import expectation

    importers = dict(sorted(_registry().importers.items()))
    chosen = importers[format_name].options if format_name in importers else None
    for name in given:
        if chosen is None or name not in chosen.model_fields:
            owner = next(owner for owner, importer in importers.items() if name in importer.options.model_fields)
            raise ConfigError(
                f"{_flags(importers[owner].options)} for --from {owner}, not {format_name}", fix="leave them out"
            )
    if chosen is None:
        return None
    try:
        return chosen.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = _flag(str(first["loc"][0])) if first["loc"] else f"--from {format_name}"
        if first["type"] == "missing":
            raise ConfigError(f"--from {format_name} needs {flag}", fix="add it") from error
        raise ConfigError(
            f"{flag} is {first['input']!r}", expected=expectation(error), fix="correct the value"
        ) from error


def _flags(options: type[PluginConfig]) -> str:
    *others, last = map(_flag, options.model_fields)
    return f"{', '.join(others)} and {last} are" if others else f"{last} is"
