"""``arctic_plugins.json`` appears whole or not at all, and a newer one is refused."""

import json

import pytest

from arctic_plugins import Stack, provenance, stack_from_checkpoint
from arctic_plugins.errors import CheckpointError
from arctic_plugins.provenance import FILE_NAME, check_plugins, read_provenance, write_provenance


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


def test_what_is_older_here_than_what_wrote_it_is_told_once(tmp_path, caplog):
    write_provenance(tmp_path, Stack.from_dict({"fp8": {}, "lora": {}}).to_dict())
    check_plugins(read_provenance(tmp_path))
    assert not caplog.messages
    written = json.loads((tmp_path / FILE_NAME).read_text())
    written["versions"]["arctic-plugins"] = "99.1+local"
    written["plugins"] = {"fp8": "arctic-plugins-fp8==99.0", "lora": "another-lora==99.0"}
    (tmp_path / FILE_NAME).write_text(json.dumps(written))
    for _ in range(2):
        check_plugins(read_provenance(tmp_path))
    assert [message.split(", which")[0].split(", and")[0] for message in caplog.messages] == [
        "the checkpoint was written by arctic-plugins 99.1+local",
        "the checkpoint was written by arctic-plugins-fp8 99.0",
    ]
    assert "pip install --upgrade 'arctic-plugins>=99.1'" in caplog.messages[0]
    # A file may say anything.
    written["versions"]["arctic-plugins"] = ["99"]
    written["plugins"] = {"fp8": "arctic-plugins-fp8==; rm -rf", "lora": 3}
    (tmp_path / FILE_NAME).write_text(json.dumps(written))
    check_plugins(read_provenance(tmp_path))
    assert len(caplog.messages) == 2
    provenance._warn_older.cache_clear()
