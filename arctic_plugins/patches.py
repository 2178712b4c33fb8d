"""The one place where attributes of other libraries are replaced: every patch is declared, listed and can be undone.

Use it where a library has no public way. A patch says what it replaces, why, and in which version it was read::

    @patch(rotary_embedding, "get_rope", why="vLLM has no registry of RoPE types", read_in="vllm 0.32.0")
    def get_rope(original, head_size, *args, **kwargs):
        ...
        return original(head_size, *args, **kwargs)

Call it when a host is registered or a trainer attached, never when a module is imported. Importing this loads nothing
heavy.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any, Literal, TypeVar

from arctic_plugins.errors import PluginError

__all__ = ["Patch", "patch", "patches", "private", "replaced", "temporary_patches", "undo_patches"]

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Patch:
    """What was done to an attribute of another library."""

    owner: str
    """The dotted name of the module or class; for an object, that of its class."""
    name: str
    why: str
    read_in: str
    """The library and the version in which the attribute was read, ``vllm 0.32.0`` for instance."""
    by: str
    """The module that did it."""
    kind: Literal["replaced", "used"] = "replaced"
    """``used``: a private attribute that is called and stays as it is."""

    def __str__(self) -> str:
        return f"{self.owner}.{self.name} is {self.kind} by {self.by}: {self.why} (read in {self.read_in})"


class _Made:
    """A patch that is in force. Of an object it keeps nothing alive: what it replaced goes when the object goes."""

    def __init__(self, about: Patch, owner: object, installed: Any, original: Any, function: Any = None) -> None:
        lasting = isinstance(owner, ModuleType | type)
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


def patch(owner: object, name: str, *, why: str, read_in: str, chained: bool = False) -> Callable[[Function], Function]:
    """Decorate the function that is called in place of ``owner.name``: it gets the original first, then the arguments.

    Of a class, the function gets the object next, as methods do; class and static methods stay what they are. Of an
    object, the original is bound to it. ``inspect.signature`` gives the original's signature. The decorated function
    itself stays as it is, so that it can be tested. Applied again, the same function changes nothing.

    Args:
        owner: a module, a class, or an object, whose patch goes when it goes.
        name: of the function or method.
        why: what it is for, and why there is no public way.
        read_in: library and version.
        chained: whether it may come on top of another patch of the same attribute, which it then calls.

    Raises:
        PluginError: there is no such function; another patch has it and this one is not ``chained``; or somebody else
            has replaced it after we did. The message names who.
    """

    def decorate(function: Function) -> Function:
        about = Patch(_called(owner), name, why, read_in, function.__module__)
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
        installed = _calling(function, original)
        made = _Made(about, owner, installed, original, function)
        setattr(owner, name, installed)
        _made.append(made)
        logger.debug("%s", about)
        return function

    return decorate


def replaced(owner: object, name: str, value: Any, *, why: str, read_in: str) -> AbstractContextManager[None]:
    """A context in which the attribute ``name`` of ``owner`` is ``value``.

    Raises:
        PluginError: there is no such attribute, or it is replaced already; when the context ends, somebody else has
            replaced it.
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
    """The private attribute ``name`` of ``owner``, whose use is listed among the patches.

    Raises:
        PluginError: there is none in the version that is installed.
    """
    about = Patch(_called(owner), name, why, read_in, sys._getframe(1).f_globals["__name__"], "used")
    if not hasattr(owner, name):
        raise _missing(about)
    _uses[about.owner, name, about.by] = about
    return getattr(owner, name)


def patches() -> list[Patch]:
    """What is in force in this process, in the order in which it was done; then the private attributes in use."""
    _forget_the_dead()
    return [*(made.about for made in _made), *(about for _, about in _values), *_uses.values()]


def undo_patches() -> None:
    """Take back every patch, the last first.

    Raises:
        PluginError: somebody else has replaced one since; it and the patches before it stay.
    """
    _undo([])


@contextmanager
def temporary_patches() -> Iterator[None]:
    """For tests: patches that are made in this context are undone at its end."""
    before, used = list(_made), dict(_uses)
    try:
        yield
    finally:
        _uses.clear()
        _uses.update(used)
        _undo(before)


def _undo(keep: list[_Made]) -> None:
    for made in reversed(_made.copy()):
        if not any(made is each for each in keep):
            made.undo()
            _made.remove(made)


_ABSENT = object()


def _read(owner: object, name: str) -> Any:
    """The attribute; of a class as it is stored there, a function and no method."""
    if isinstance(owner, ModuleType | type):
        return inspect.getattr_static(owner, name, _ABSENT)
    return getattr(owner, name, _ABSENT)


def _is_own(owner: object, name: str) -> bool:
    """Whether the attribute is put back by assigning it; otherwise what is assigned hides that of a class."""
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


def _same(one: Any, other: Any) -> bool:
    """Whether two functions are one, or were made by the same ``def`` around the same objects."""
    if one == other:
        return True
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
        expected="one of them, or a second one that says that it is chained",
        fix="leave one of the two plugins out, and report it to their authors",
    )


def _overridden(about: Patch, owner: object) -> PluginError:
    found = _read(owner, about.name)
    who = f"{found.__module__}.{found.__qualname__}" if hasattr(found, "__qualname__") else repr(found)
    return PluginError(
        f"{about.owner}.{about.name} was replaced by {who} after {about.by} had patched it ({about.why})",
        expected="nobody else who does",
        fix="do without one of the two, or let the other one patch first",
    )
