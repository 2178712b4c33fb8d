"""``arctic_plugins.json`` appears whole or not at all, and a newer one is refused."""

import json

import pytest

from arctic_plugins import Stack, stack_from_checkpoint
from arctic_plugins.errors import CheckpointError
from arctic_plugins.provenance import FILE_NAME, read_provenance, write_provenance


def test_what_is_written_is_read_back(tmp_path):
    stack = Stack.from_dict({"fp8": {"group_size": 64}, "lora": {"r": 4}})
    write_provenance(tmp_path, stack.to_dict())
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    read = read_provenance(tmp_path)
    assert read.sha256 == stack.sha256()
    assert read.versions["arctic-plugins"]
    assert read.plugins["fp8"].startswith("arctic-plugins-fp8==")
    assert read.files == {}
    assert stack_from_checkpoint(tmp_path).to_dict() == stack.to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no arctic_plugins.json"),
        ("{", "is not valid JSON"),
        ("[]", "has the top-level type list; expected an object"),
        (json.dumps({"format": 99}), "has format 99; expected at most 1; upgrade"),
        (json.dumps({"format": 1}), "has stack None; expected an object"),
    ],
)
def test_files_that_are_not_a_commit_mark(tmp_path, content, message):
    if content is not None:
        (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_provenance(tmp_path)
