"""What all conformance suites have in common: laws that pytest collects as single tests, over an author's parts."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import pytest

from arctic_plugins.errors import ArcticDeprecationWarning

__all__ = ["Suite"]


class Suite:
    """Base of the suites. Each method whose name begins with ``test_`` is a law.

    Subclass a suite in a test module, in a class whose name begins with ``Test``, and set its attributes. A law that
    cannot hold for a part is set to None in the subclass, with a comment that says why.
    """

    over: ClassVar[Mapping[str, str]] = {}
    """Argument of the laws -> the attribute with the values for which each law is a test of its own."""
    deprecations: ClassVar[Literal["error", "default", "ignore"]] = "error"
    """What happens if the author's code uses something deprecated: the law fails, pytest shows a warning, or nothing.

    The value is an action of Python's warning filters for
    :class:`~arctic_plugins.errors.ArcticDeprecationWarning`.
    """

    @pytest.fixture(autouse=True)
    def _deprecations(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter(self.deprecations, ArcticDeprecationWarning)
            yield

    @classmethod
    def laws(cls) -> dict[str, Callable[..., None]]:
        """Return the name and function of every law, those of base classes first, in the order of their definition."""
        names = dict.fromkeys(name for base in reversed(cls.__mro__) for name in vars(base) if name.startswith("test_"))
        return {name: law for name in names if (law := getattr(cls, name)) is not None}

    def check(self, **arguments: Any) -> None:
        """Run all laws with ``arguments``, one after another, without pytest: in the processes of a distributed test.

        Raises:
            AssertionError: a law is broken.
        """
        for law in self.laws().values():
            with contextlib.suppress(pytest.skip.Exception):
                law(self, **{name: arguments[name] for name in inspect.signature(law).parameters if name != "self"})

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each law for every part that the subclass sets. pytest calls it."""
        for argument, attribute in self.over.items():
            if argument in metafunc.fixturenames:
                values: Iterable[Any] = getattr(self, attribute, ())
                if not values:
                    pytest.fail(f"{type(self).__name__} sets no {attribute}", pytrace=False)
                metafunc.parametrize(argument, list(values), ids=_name)


def _name(part: Any) -> str:
    """Return the name of ``part`` in a test's id, which must be the same in every process that collects the test."""
    if (describe := getattr(part, "describe", None)) is not None:
        return str(describe())
    text = getattr(part, "__name__", None) or str(part)
    return type(part).__name__ if " at 0x" in text else text
