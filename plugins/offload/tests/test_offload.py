"""What leaves, where it goes, that nothing changes, and that memory really is given back."""

import mmap
from pathlib import Path

import pytest
import torch
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_offload import plugin as offload
from arctic_plugins_offload.config import OffloadConfig
from arctic_plugins_offload.disk import DiskStore
from arctic_plugins_offload.placement import OffloadPlacement, choose

from arctic_plugins import Stack
from arctic_plugins.errors import ClaimError, ConfigError, UserError
from arctic_plugins.frozen import FrozenLinear, FrozenModule
from arctic_plugins.testing import check_placement

IDS = torch.arange(10, 42)[None]
SIZES = {"0.q": 10, "0.up": 40, "1.q": 10, "1.up": 40, "2.q": 10, "2.up": 40, "3.q": 10, "3.up": 40}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def resident(*buffers):
    """Bytes of the buffers' pages that are in this process's memory (Documentation/admin-guide/mm/pagemap.rst: bit 63
    is 'present').
    """
    pages = 0
    with open("/proc/self/pagemap", "rb") as file:
        for buffer in buffers:
            first, last = buffer.data_ptr() // mmap.PAGESIZE, (buffer.data_ptr() + buffer.nbytes - 1) // mmap.PAGESIZE
            file.seek(8 * first)
            entries = file.read(8 * (last - first + 1))
            pages += sum(entry >> 7 for entry in entries[7::8])
    return pages * mmap.PAGESIZE


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, list(SIZES)),
        ({"ratio": 0}, []),
        ({"ratio": 0.4}, ["0.up", "2.up"]),
        ({"ratio": 0.8}, ["0.up", "1.up", "2.up", "3.up"]),
        ({"ratio": 0.5, "select": "in_order"}, ["0.q", "0.up", "1.q", "1.up"]),
        ({"budget": 200}, []),
        ({"budget": 199}, ["0.q"]),
        ({"budget": 199, "select": "in_order"}, ["0.q"]),
        ({"budget": 130}, ["0.up", "2.up"]),
        ({"budget": 150}, ["0.q", "0.up"]),
        ({"budget": 100}, ["0.up", "1.up", "2.up"]),
        ({"budget": 0}, list(SIZES)),
    ],
)
def test_what_leaves(options, expected):
    chosen = choose(SIZES, OffloadConfig(**options))
    assert chosen == expected
    if "budget" in options:
        assert sum(SIZES.values()) - sum(SIZES[name] for name in chosen) <= options["budget"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "plugins.offload.ratio is 1.5; expected less than or equal to 1"),
        ({"ratio": 0.5, "budget": "1GiB"}, "ratio and budget are mutually exclusive"),
        ({"ratio": 0.5, "select": ["**"]}, "cannot be combined with ratio or budget"),
        ({"budget": "lots"}, r"plugins.offload.budget is 'lots'"),
        ({"path": "/tmp"}, "path requires 'to: disk'"),
        ({"rato": 0.5}, "did you mean 'ratio'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Stack.from_dict({"offload": options})


def test_budgets_have_units():
    assert OffloadConfig(budget="60GiB").budget == 60 * 2**30
    assert Stack.from_dict({"offload": {"budget": "1MB"}}).to_dict()["offload"]["budget"] == 10**6


@pytest.mark.parametrize("base", [{"fp8": {}}, {"fp8": {"bits": 6, "group_size": 32}}, {"fp8": {"bits": 12}}, {}])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_logits_and_checkpoints_are_bitwise_the_same(tiny_checkpoint, tmp_path, base, where):
    offload = {"to": where, "ratio": 0.6, **({"path": str(tmp_path / "files")} if where == "disk" else {})}
    expected, _ = load_model(tiny_checkpoint, Stack.from_dict(base))
    model, tokenizer = load_model(tiny_checkpoint, stack := Stack.from_dict({**base, "offload": offload}))
    for _ in range(3):  # the second time in the order that was learnt
        assert torch.equal(logits(model), logits(expected))
    placed = [
        weight
        for module in model.modules()
        if isinstance(module, FrozenModule)
        for weight in module.frozen.values()
        if weight.handle
    ]
    assert 0 < len(placed) < len([module for module in model.modules() if isinstance(module, FrozenModule)])
    assert not list((tmp_path / "files").glob("*")), "files that are mapped are removed at once"
    save_checkpoint(model, tokenizer, tmp_path / "saved", stack)
    again, _ = load_model(tmp_path / "saved")
    assert torch.equal(logits(again), logits(expected))
    assert ("quantization_config" in (tmp_path / "saved" / "config.json").read_text()) == bool(base)


def test_a_saved_encoded_checkpoint_is_offloaded_as_well(tiny_checkpoint, tmp_path):
    model, tokenizer = load_model(tiny_checkpoint, stack := Stack.from_dict({"fp8": {}}))
    save_checkpoint(model, tokenizer, tmp_path / "saved", stack)
    again, _ = load_model(
        tmp_path / "saved", Stack.from_dict({"offload": {"to": "disk", "path": str(tmp_path / "files")}})
    )
    assert all(module.handle is not None for name, module in again.named_modules() if name.endswith("_proj"))
    assert torch.equal(logits(again), logits(model))


def test_pages_leave_memory_after_use(tmp_path):
    store = DiskStore(tmp_path, ahead=0)
    codes = torch.randint(0, 255, (1024, 1024), dtype=torch.uint8)
    weight = store.hold("layer.weight", {"": codes, "_scale": torch.rand(1024, 1)})
    with weight.lease(codes.device) as buffers:
        assert torch.equal(buffers[""], codes)
        with weight.lease(codes.device) as again:
            assert again[""] is buffers[""]
        assert resident(buffers[""]) >= codes.nbytes, "a lease within a lease keeps the pages"
    assert resident(weight.export()[""]) == 0
    assert torch.equal(weight.export()[""], codes)


def test_what_comes_next_is_read_ahead_and_no_more(tmp_path):
    store = DiskStore(tmp_path, ahead=1)
    names = [f"layers.{index}.weight" for index in range(4)]
    weights = [
        store.hold(name, {"": torch.full((1 << 20,), index, dtype=torch.uint8)}) for index, name in enumerate(names)
    ]
    cpu = torch.device("cpu")
    for index in (0, 1, 2, 3, 2, 1, 0) * 2:  # forward and backward, and how the next step begins
        with weights[index].lease(cpu):
            pass
    for index, following in ((0, 1), (1, 2), (2, 3), (3, 2), (2, 1), (1, 0)):
        with weights[index].lease(cpu) as buffers:
            for future in store.prefetch.pending.values():
                future.result()
            assert buffers[""][0] == index
            assert [weight.name for weight in store.prefetch.pending] == [names[following]]
            assert resident(weights[following].export()[""]) >= 1 << 20
            others = [weight.export()[""] for other, weight in enumerate(weights) if other not in (index, following)]
            assert resident(*others) == 0


@pytest.mark.parametrize("where", ["host", "disk"])
def test_both_stores_keep_the_contract(tmp_path, where):
    options = {"to": where, **({"path": str(tmp_path)} if where == "disk" else {})}
    check_placement(lambda: OffloadPlacement(OffloadConfig(**options), tmp_path))


def test_a_module_that_is_used_twice_in_one_pass(tmp_path):
    def run(placement):
        torch.manual_seed(0)
        layer = FrozenLinear(64, 64, bias=False, codec=FP8Codec(), placement=placement)
        layer.encode(torch.randn(64, 64) / 8)
        x = torch.randn(4, 64, requires_grad=True)
        layer(layer(layer(x)).relu()).square().sum().backward()
        return x.grad

    assert torch.equal(run(None), run(OffloadPlacement(OffloadConfig(to="disk", path=str(tmp_path)), tmp_path)))


def test_training_under_checkpointing_evaluation_and_generation(tiny_checkpoint, tmp_path):
    def run(options):
        torch.manual_seed(0)
        model, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "lora": {"r": 4}, **options}))
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2
        )
        losses = []
        for _ in range(3):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            model.eval()
            losses.append(logits(model).sum().item())
            model.train()
        model.eval()
        return losses, model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False).tolist()

    assert run({}) == run({"offload": {"to": "disk", "path": str(tmp_path)}})


def test_a_weight_that_changes_gets_a_file_of_its_own(tiny_checkpoint, tmp_path):
    model, _ = load_model(
        tiny_checkpoint, Stack.from_dict({"fp8": {}, "offload": {"to": "disk", "path": str(tmp_path)}})
    )
    layer = model.model.layers[0].mlp.up_proj
    before, handle = layer.decode(), layer.handle
    layer.encode(before * 2)
    assert layer.handle is not handle
    torch.testing.assert_close(layer.decode(), before * 2)


def test_the_directory_may_go_when_weights_are_in_it(tiny_checkpoint, tmp_path):
    where = tmp_path / "disk"
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "offload": {"to": "disk", "path": str(where)}}))
    ids = torch.arange(10, 42)[None]
    before = model(ids).logits
    assert list(where.iterdir()) == []  # files lose their names as soon as they are mapped
    where.rmdir()
    assert torch.equal(model(ids).logits, before)


def test_no_room_is_said_before_anything_is_read(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match=r"has 0.0 GB free; expected .* GB for the offloaded weights"):
        load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "offload": {"to": "disk", "path": str(tmp_path)}}))


def test_a_directory_that_cannot_be_written_is_one_line(tiny_checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        load_model(
            tiny_checkpoint, Stack.from_dict({"fp8": {}, "offload": {"to": "disk", "path": str(tmp_path / "file")}})
        )


def test_patterns_that_match_nothing(tiny_checkpoint):
    with pytest.raises(ClaimError, match=r"plugins.offload.select '\*\*.mlpp' matches no linear module"):
        load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "offload": {"select": ["**.mlpp"]}}))
    with pytest.raises(ClaimError, match="but no encoded ones"):
        load_model(
            tiny_checkpoint,
            Stack.from_dict({"fp8": {"include": ["**.mlp.*"]}, "offload": {"select": ["**.self_attn.*"]}}),
        )


def test_a_file_system_in_memory_and_a_machine_without_gpu_are_pointed_out(
    tiny_checkpoint, tmp_path, caplog, monkeypatch
):
    assert offload.file_system(Path("/proc/self")) == "proc"
    monkeypatch.setattr(offload, "file_system", lambda path: "tmpfs")
    load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "offload": {"to": "disk", "path": str(tmp_path)}}))
    assert "is on a tmpfs, whose files are in memory" in caplog.text
    if not torch.cuda.is_available():
        load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "offload": {}}))
        assert "without a GPU, 'to: host' moves nothing" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_memory_is_pinned_and_copied_ahead(tiny_checkpoint):
    expected, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}}))
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "offload": {"to": "host"}}))
    expected, model = expected.cuda().eval(), model.cuda().eval()
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(model(IDS.cuda()).logits, expected(IDS.cuda()).logits)
    assert all(buffer.is_pinned() for buffer in model.model.layers[0].mlp.up_proj.handle.export().values())
