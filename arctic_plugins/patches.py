"""The one place where attributes of other libraries are replaced: every patch is declared, listed and can be undone.

Use it where a library has no public interface. A patch names what it replaces, why, and the version it was read in::

    @patch(rotary_embedding, "get_rope", why="vLLM has no registry of RoPE types", read_in="vllm 0.32.0")
    def get_rope(original, head_size, *args, **kwargs):
        ...
        return original(head_size, *args, **kwargs)

Apply patches when a host is registered or a trainer is attached, never when a module is imported. Importing this module
loads nothing heavy.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import MethodType, ModuleType
from typing import Any, Literal, TypeVar

from arctic_plugins.errors import PluginError

__all__ = [
    "Patch",
    "patch",
    "patch_when_imported",
    "patches",
    "private",
    "replaced",
    "temporary_patches",
    "undo_patches",
]

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Patch:
    """A change to an attribute of another library."""

    owner: str
    """The dotted name of the module or class; for an object, the name of its class."""
    name: str
    """The name of the attribute."""
    why: str
    """The reason, for users: what the library lacks."""
    read_in: str
    """The library and the version in which the attribute was read, for example ``vllm 0.32.0``."""
    by: str
    """The module that made the change."""
    kind: Literal["replaced", "used", "replaced once imported"] = "replaced"
    """``used``: a private attribute that is used but not changed."""

    def __str__(self) -> str:
        return f"{self.owner}.{self.name} is {self.kind} by {self.by}: {self.why} (read in {self.read_in})"


class _Made:
    """A patch in force. For an object, it keeps nothing alive: what it replaced disappears with the object."""

    def __init__(self, about: Patch, owner: object, installed: Any, original: Any, function: Any = None) -> None:
        lasting = _lasts(owner)
        hold: Callable[[Any], Callable[[], Any]] = (lambda thing: lambda: thing) if lasting else weakref.ref
        self.about = about
        self.own = _is_own(owner, about.name)
        self.owner, self.installed = hold(owner), hold(installed)
        self.original = original if lasting else None
        self.function = function if function is None else hold(function)

    def is_in_place(self) -> bool:
        installed = self.installed()
        return installed is not None and _read(self.owner(), self.about.name) is installed

    def undo(self) -> None:
        owner = self.owner()
        if owner is None:
            return
        if not self.is_in_place():
            raise _overridden(self.about, owner)
        original = self.installed().__wrapped__ if self.original is None else self.original
        _put_back(owner, self.about.name, original, self.own)


_made: list[_Made] = []
_uses: dict[tuple[str, str, str], Patch] = {}
_values: list[tuple[object, Patch]] = []
_awaited: list[_WhenImported] = []


def patch(owner: object, name: str, *, why: str, read_in: str, chained: bool = False) -> Callable[[Function], Function]:
    """Decorate a function that is to be called in place of ``owner.name``, with the original as its first argument.

    If the owner is a class, the object comes next, as in methods; class methods and static methods stay what they are.
    If it is an object, the original is bound to it. ``inspect.signature`` returns the original's signature. The
    decorated function itself is unchanged, so that it can be tested. Applying the same function again has no effect.

    Args:
        owner: a module, a class or an object. The patch of an object disappears with it. A deep copy of the object has
            the same patch, but it is not listed.
        name: of the function or method.
        why: what it is for, and why there is no public interface for it.
        read_in: library and version.
        chained: whether it may be applied on top of another patch of the same attribute, which it then calls.

    Raises:
        PluginError: there is no such function; it is already patched and this patch is not ``chained``; or other code
            has replaced it since this project patched it. The message names the other patch or code.
    """

    def decorate(function: Function) -> Function:
        about = Patch(_called(owner), name, why, read_in, _module_of(function))
        before = _of(owner, name)
        if before and not before[-1].is_in_place():
            raise _overridden(before[-1].about, owner)
        if any(_same(made.function(), function) for made in before if made.function is not None):
            return function
        if before and not chained:
            raise _twice(before[-1].about, about)
        original = _read(owner, name)
        if isinstance(original, property) or not callable(getattr(owner, name, None)):
            raise _missing(about, "function ")
        installed = (_calling if _lasts(owner) else _calling_for_one)(function, original)
        made = _Made(about, owner, installed, original, function)
        setattr(owner, name, installed)
        _made.append(made)
        logger.debug("%s", about)
        return function

    return decorate


def patch_when_imported(
    module: str, owner: str | None, name: str, *, why: str, read_in: str
) -> Callable[[Function], Function]:
    """Like :func:`patch`, for a module that takes seconds to import and that most programs do not need.

    Args:
        module: the module's dotted name; if it is imported already, the patch is made at once.
        owner: the name of a class in the module; None for a function of the module itself.
        name: the method, or the function.
        why: see :func:`patch`.
        read_in: see :func:`patch`.
    """

    where = module if owner is None else f"{module}.{owner}"

    def decorate(function: Function) -> Function:
        def make(found: ModuleType) -> None:
            target = found if owner is None else getattr(found, owner, found)
            patch(target, name, why=why, read_in=read_in)(function)

        if (found := sys.modules.get(module)) is not None:
            if hasattr(found, owner or name):  # not while another thread is importing the module
                make(found)
        elif not any(finder.about.owner == where and finder.about.name == name for finder in _awaited):
            about = Patch(where, name, why, read_in, _module_of(function), "replaced once imported")
            finder = _WhenImported(module, make, about)
            _awaited.append(finder)
            sys.meta_path.insert(0, finder)
        return function

    return decorate


class _WhenImported(MetaPathFinder):
    """Import hook that calls ``make`` with a module once it has been executed. It finds no modules itself."""

    def __init__(self, module: str, make: Callable[[ModuleType], None], about: Patch) -> None:
        self.module, self.make, self.about = module, make, about

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        self.forget()
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                self.make(module)

            spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec

    def forget(self) -> None:
        sys.meta_path.remove(self)
        _awaited.remove(self)


def replaced(owner: object, name: str, value: Any, *, why: str, read_in: str) -> AbstractContextManager[None]:
    """Return a context in which the attribute ``name`` of ``owner`` is ``value``.

    Raises:
        PluginError: there is no such attribute, or it is already replaced; or other code has replaced it by the time
            the context ends.
    """
    about = Patch(_called(owner), name, why, read_in, sys._getframe(1).f_globals["__name__"])
    return _replaced(owner, value, about)


@contextmanager
def _replaced(owner: object, value: Any, about: Patch) -> Iterator[None]:
    name, entry = about.name, (owner, about)
    before = [made.about for made in _of(owner, name)]
    before += [other for holder, other in _values if holder is owner and other.name == name]
    if before:
        raise _twice(before[-1], about)
    if (original := _read(owner, name)) is _ABSENT:
        raise _missing(about)
    own = _is_own(owner, name)
    setattr(owner, name, value)
    _values.append(entry)
    try:
        yield
    finally:
        _values[:] = [each for each in _values if each is not entry]
        if _read(owner, name) is not value:
            raise _overridden(about, owner)
        _put_back(owner, name, original, own)


def private(owner: object, name: str, *, why: str, read_in: str) -> Any:
    """Return the private attribute ``name`` of ``owner``, and list its use among the patches.

    Raises:
        PluginError: the installed version has no such attribute.
    """
    about = Patch(_called(owner), name, why, read_in, sys._getframe(1).f_globals["__name__"], "used")
    if not hasattr(owner, name):
        raise _missing(about)
    _uses[about.owner, name, about.by] = about
    return getattr(owner, name)


def patches() -> list[Patch]:
    """Return the patches in force in this process, in the order they were made.

    The private attributes in use follow, then the patches that await an import.
    """
    _forget_the_dead()
    awaited = (finder.about for finder in _awaited)
    return [*(made.about for made in _made), *(about for _, about in _values), *_uses.values(), *awaited]


def undo_patches() -> None:
    """Undo every patch, the last one first.

    Raises:
        PluginError: other code has replaced a patched attribute since. That patch and those before it stay.
    """
    for finder in _awaited.copy():
        finder.forget()
    _undo([])


@contextmanager
def temporary_patches() -> Iterator[None]:
    """Undo the patches that are made in this context when it ends; for tests."""
    before, used, awaited = list(_made), dict(_uses), list(_awaited)
    try:
        yield
    finally:
        _uses.clear()
        _uses.update(used)
        for finder in _awaited.copy():
            if finder not in awaited:
                finder.forget()
        _undo(before)


def _undo(keep: list[_Made]) -> None:
    for made in reversed(_made.copy()):
        if not any(made is each for each in keep):
            made.undo()
            _made.remove(made)


_ABSENT = object()


def _lasts(owner: object) -> bool:
    """Return whether ``owner`` is a module or a class, which stays, and not an object, which may disappear."""
    return isinstance(owner, ModuleType | type)


def _read(owner: object, name: str) -> Any:
    """Return the attribute; of a class, as it is stored there: a function, not a method."""
    if _lasts(owner):
        return inspect.getattr_static(owner, name, _ABSENT)
    return getattr(owner, name, _ABSENT)


def _is_own(owner: object, name: str) -> bool:
    """Return whether assigning the attribute puts it back; if not, an assigned value hides the attribute of a class."""
    stored = getattr(owner, "__dict__", (name,))
    return name in stored or inspect.isdatadescriptor(inspect.getattr_static(type(owner), name, None))


def _put_back(owner: object, name: str, original: Any, own: bool) -> None:
    if own:
        setattr(owner, name, original)
    else:
        delattr(owner, name)


def _calling(function: Callable[..., Any], original: Any) -> Any:
    if isinstance(original, staticmethod | classmethod):
        return type(original)(_calling(function, original.__func__))

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    return call


def _calling_for_one(function: Callable[..., Any], original: Any) -> Any:
    """Return a partial: in a deep copy of the object (such as a copied model), it calls what belongs to the copy."""
    return functools.update_wrapper(functools.partial(function, original), original)


def _module_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(function.__module__)


def _same(one: Any, other: Any) -> bool:
    """Return whether two functions are the same, or come from the same ``def`` around the same objects.

    ``one`` may no longer exist.
    """
    if one is None or one == other:
        return one is not None
    if getattr(one, "__code__", one) is not getattr(other, "__code__", None) or isinstance(one, MethodType):
        return False
    around = zip(one.__closure__ or (), other.__closure__ or (), strict=True)
    return all(_content(mine) is _content(others) for mine, others in around)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _of(owner: object, name: str) -> list[_Made]:
    _forget_the_dead()
    return [made for made in _made if made.owner() is owner and made.about.name == name]


def _forget_the_dead() -> None:
    _made[:] = [made for made in _made if made.owner() is not None]


def _called(owner: object) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"


def _missing(about: Patch, what: str = "") -> PluginError:
    return PluginError(
        f"{about.owner} has no {what}{about.name}",
        expected=f"the one of {about.read_in}, which {about.by} needs: {about.why}",
        fix="use a version in the range that the integration declares",
    )


def _twice(first: Patch, second: Patch) -> PluginError:
    return PluginError(
        f"{first.owner}.{first.name} is patched by {first.by} ({first.why}) and by {second.by} ({second.why})",
        expected="only one of them, or a second one that is declared as chained",
        fix="remove one of the two plugins, and report the conflict to their authors",
    )


def _overridden(about: Patch, owner: object) -> PluginError:
    found = _read(owner, about.name)
    who = f"{found.__module__}.{found.__qualname__}" if hasattr(found, "__qualname__") else repr(found)
    return PluginError(
        f"{about.owner}.{about.name} was replaced by {who} after {about.by} had patched it ({about.why})",
        expected="no other code to replace it",
        fix="do without one of the two, or make the other one patch first",
    )
