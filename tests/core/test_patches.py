"""Patches of other libraries are declared: listed, undone, and refused where two would meet."""

import contextlib
import copy
import functools
import gc
import inspect
import types
import weakref

import pytest

from arctic_plugins.errors import PluginError
from arctic_plugins.patches import patch, patches, private, replaced, temporary_patches, undo_patches

ABOUT = {"why": "to see", "read_in": "library 1.0"}


@pytest.fixture(autouse=True)
def _undone(monkeypatch):
    """What hosts have patched in this process stays, and other tests need it."""
    for name in ("_made", "_awaited"):
        monkeypatch.setattr(f"arctic_plugins.patches.{name}", [])
    with temporary_patches():
        yield


@pytest.fixture
def library():
    """A library of another's: a module with a function, a value and a class."""
    module = types.ModuleType("library")
    source = """
SIZE = 1
def double(x, *, by=2): return x * by
class Base:
    def inherited(self): return "inherited"
class Model(Base):
    scale = 3
    def __init__(self): self.size = 4
    def forward(self, x): return x * self.scale
    @staticmethod
    def static(x): return x
    @classmethod
    def named(cls): return cls.__name__
    @property
    def read(self): return 5
    def _hidden(self): return "hidden"
"""
    exec(source, module.__dict__)
    return module


def one_more(original, *args, **kwargs):
    return original(*args, **kwargs) + 1


def test_the_function_gets_the_original_first(library):
    signature = inspect.signature(library.double)
    assert patch(library, "double", **ABOUT)(one_more) is one_more
    assert (library.double(5), library.double(5, by=3)) == (11, 16)
    assert inspect.signature(library.double) == signature
    undo_patches()
    assert library.double(5) == 10


def test_a_deep_copy_of_a_patched_object_calls_what_is_its_own(library):
    model = library.Model()
    patch(model, "forward", **ABOUT)(functools.partial(one_more))
    other = copy.deepcopy(model)
    other.scale = 10
    assert (model.forward(2), other.forward(2)) == (7, 21)
    assert [(made.name, made.by) for made in patches()] == [("forward", __name__)]


def test_methods_of_classes_and_of_objects(library):
    model, other = library.Model(), library.Model()

    @patch(library.Model, "forward", **ABOUT)
    def forward(original, self, x):
        return original(self, x) + self.size

    patch(library.Model, "static", **ABOUT)(one_more)

    @patch(library.Model, "named", **ABOUT)
    def named(original, cls):
        return f"{original(cls)}!"

    @patch(library.Model, "inherited", **ABOUT)
    def inherited(original, self):
        return f"not {original(self)}"

    patch(model, "forward", **ABOUT)(one_more)
    assert (model.forward(2), other.forward(2)) == (11, 10)
    assert (library.Model.static(2), other.static(2), library.Model.named(), other.named()) == (
        3,
        3,
        "Model!",
        "Model!",
    )
    assert (other.inherited(), library.Base().inherited()) == ("not inherited", "inherited")
    assert len(patches()) == 5
    undo_patches()
    assert patches() == []
    assert (model.forward(2), other.static(2), other.named(), other.inherited()) == (6, 2, "Model", "inherited")
    assert "forward" not in vars(model)
    assert "inherited" not in vars(library.Model)
    assert isinstance(vars(library.Model)["static"], staticmethod)


def test_they_are_listed(library):
    patch(library, "double", **ABOUT)(one_more)
    model = library.Model()
    with replaced(model, "size", 7, **ABOUT):
        listed = [str(each) for each in patches()]
    assert listed == [
        f"library.double is replaced by {__name__}: to see (read in library 1.0)",
        f"library.Model.size is replaced by {__name__}: to see (read in library 1.0)",
    ]
    assert len(patches()) == 1


def test_the_same_patch_twice_is_one(library):
    def install(owner):
        @patch(owner, "double", **ABOUT)
        def around(original, x):
            assert owner
            return original(x) + 1

    for _ in range(3):
        patch(library, "double", **ABOUT)(one_more)
    assert library.double(5) == 11
    undo_patches()
    for _ in range(3):
        install(library)
    assert library.double(5) == 11
    assert len(patches()) == 1


def test_another_patch_is_refused_unless_it_is_chained(library):
    patch(library, "double", **ABOUT)(one_more)

    def ten_more(original, *args):
        return original(*args) + 10

    again = {"why": "to see better", "read_in": "library 1.0"}
    with pytest.raises(PluginError, match=r"library\.double is patched by .* \(to see\) and by .* \(to see better\)"):
        patch(library, "double", **again)(ten_more)
    with pytest.raises(PluginError, match=r"library\.double is patched by"), replaced(library, "double", max, **again):
        pass
    assert library.double(5) == 11
    patch(library, "double", **again, chained=True)(ten_more)
    assert library.double(5) == 21
    for function in (one_more, ten_more):
        patch(library, "double", **ABOUT)(function)
    assert library.double(5) == 21, "both are there already"
    undo_patches()
    assert library.double(5) == 10


def test_somebody_else_who_came_later_is_named(library):
    original = library.double
    patch(library, "double", **ABOUT)(one_more)
    ours = library.double

    @functools.wraps(ours)
    def theirs(x):
        return ours(x)

    theirs.__module__ = "elsewhere"
    library.double = theirs
    message = r"library\.double was replaced by elsewhere\..*double after .*test_patches had patched it \(to see\)"
    for act in (lambda: patch(library, "double", **ABOUT, chained=True)(one_more), undo_patches):
        with pytest.raises(PluginError, match=message):
            act()
    assert library.double is theirs
    library.double = ours
    undo_patches()
    assert library.double is original


def test_what_a_version_does_not_have(library):
    for owner, name in ((library, "triple"), (library, "SIZE"), (library.Model, "read"), (library.Model(), "size")):
        with pytest.raises(
            PluginError, match=f"has no function {name}; expected the one of library 1.0, which .*to see"
        ):
            patch(owner, name, **ABOUT)(one_more)
    with pytest.raises(PluginError, match="has no sizes"), replaced(library.Model(), "sizes", 1, **ABOUT):
        pass
    with pytest.raises(PluginError, match="has no _gone; expected the one of library 1.0"):
        private(library.Model, "_gone", **ABOUT)
    assert patches() == []


def test_values_are_put_back(library):
    model = library.Model()
    for owner, name in ((library, "SIZE"), (library.Model, "scale"), (model, "size"), (model, "scale")):
        before, stored = getattr(owner, name), name in vars(owner)
        with replaced(owner, name, 9, **ABOUT):
            assert getattr(owner, name) == 9
            with pytest.raises(PluginError, match="is patched by"), replaced(owner, name, 10, **ABOUT):
                pass
        with contextlib.suppress(KeyError), replaced(owner, name, 9, **ABOUT):
            raise KeyError
        assert (getattr(owner, name), name in vars(owner)) == (before, stored)
    with pytest.raises(PluginError, match="was replaced by"), replaced(model, "size", 9, **ABOUT):
        model.size = 10
    assert model.size == 10


def test_an_object_takes_its_patches_with_it(library):
    class Extension:
        def __init__(self, model):
            self.model = model
            for _ in range(2):
                patch(model, "forward", **ABOUT)(self.forward)

        def forward(self, original, x):
            return original(x) + self.model.size

    model = library.Model()
    Extension(model)
    assert (model.forward(2), len(patches())) == (10, 1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert patches() == []


def test_private_names_are_listed_too(library):
    assert private(library.Model, "_hidden", **ABOUT)(library.Model()) == "hidden"
    private(library.Model, "_hidden", **ABOUT)
    assert [str(each) for each in patches() if each.kind == "used"] == [
        f"library.Model._hidden is used by {__name__}: to see (read in library 1.0)"
    ]


def test_only_those_of_a_test_are_undone(library):
    patch(library, "double", **ABOUT)(one_more)
    with temporary_patches():
        patch(library.Model, "forward", **ABOUT)(one_more)
        assert len(patches()) == 2
    assert len(patches()) == 1
    assert (library.double(5), library.Model().forward(2)) == (11, 6)
