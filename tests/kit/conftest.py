"""How the laws of the kit are tested."""

import inspect

import pytest


@pytest.fixture
def broken_laws(tmp_path):
    """A function that runs every law of a suite, or one, and returns the names of those that are broken."""

    def run(suite, *, only=None, **given):
        broken = set()
        for name, law in suite.laws().items():
            if only is not None and name != f"test_{only}":
                continue
            given["tmp_path"] = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            given["tmp_path"].mkdir()
            try:
                law(suite, **{argument: given[argument] for argument in list(inspect.signature(law).parameters)[1:]})
            except pytest.skip.Exception:
                continue
            except (Exception, pytest.fail.Exception):
                broken.add(name.removeprefix("test_"))
        return broken

    return run
