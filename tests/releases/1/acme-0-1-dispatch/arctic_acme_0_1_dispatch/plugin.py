"""The plugin ``acme-0-1-dispatch``: the experts of a mixture spread over processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arctic_plugins import Claim, LinearSpec, Plugin, Registry, hookimpl
from arctic_plugins.errors import ClaimError

from arctic_acme_0_1_dispatch.config import Acme01DispatchConfig

__all__ = ["Acme01Dispatch"]


class Acme01Dispatch(Plugin):
    """Experts spread over processes; claims ``experts_dispatch`` of all experts if there are several processes."""

    name = "acme-0-1-dispatch"
    contracts = frozenset({1})
    config = Acme01DispatchConfig
    slots = frozenset({"experts_dispatch"})

    options: Acme01DispatchConfig

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.experts_function("acme-0-1-dispatch", "arctic_acme_0_1_dispatch.experts:mix")

    @hookimpl
    def validate(self) -> Iterable[str]:
        self.check_processes("processes")
        return []

    @hookimpl
    def claim(self, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        if self.options.processes == 1:
            return []
        from arctic_acme_0_1_dispatch.dispatch import Acme01DispatchDispatch

        experts = [name for name, spec in modules.items() if spec.experts is not None]
        if not experts:
            raise ClaimError(
                f"plugins.{self.name}: this model has no experts that can be dispatched",
                expected="a mixture of experts",
                fix=f"leave '{self.name}' out",
            )
        dispatch = Acme01DispatchDispatch(self.options.processes)  # one object for the whole model
        return [Claim("experts_dispatch", name, dispatch) for name in experts]
