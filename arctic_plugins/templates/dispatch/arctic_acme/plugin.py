"""The plugin ``acme``: the experts of a mixture spread over processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arctic_plugins import Claim, LinearSpec, Plugin, Registry, hookimpl
from arctic_plugins.errors import ClaimError

from arctic_acme.config import AcmeConfig

__all__ = ["Acme"]


class Acme(Plugin):
    """Experts spread over processes; claims ``experts_dispatch`` of all experts if there are several processes."""

    name = "acme"
    contracts = frozenset({1})
    config = AcmeConfig
    slots = frozenset({"experts_dispatch"})

    options: AcmeConfig

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.experts_function("acme", "arctic_acme.experts:mix")

    @hookimpl
    def validate(self) -> Iterable[str]:
        self.check_processes("processes")
        return []

    @hookimpl
    def claim(self, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        if self.options.processes == 1:
            return []
        from arctic_acme.dispatch import AcmeDispatch

        experts = [name for name, spec in modules.items() if spec.experts is not None]
        if not experts:
            raise ClaimError(
                f"plugins.{self.name}: this model has no experts that can be dispatched",
                expected="a mixture of experts",
                fix=f"leave '{self.name}' out",
            )
        dispatch = AcmeDispatch(self.options.processes)  # one object for the whole model
        return [Claim("experts_dispatch", name, dispatch) for name in experts]
