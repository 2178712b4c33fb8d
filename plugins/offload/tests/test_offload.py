"""What leaves, where it goes, that nothing changes, and that memory really is given back."""

import copy
import mmap
from pathlib import Path

import pytest
import torch
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_offload import plugin as offload
from arctic_plugins_offload.config import OffloadConfig
from arctic_plugins_offload.disk import DiskStore
from arctic_plugins_offload.host import HostStore
from arctic_plugins_offload.placement import OffloadPlacement, choose

from arctic_plugins import Stack
from arctic_plugins.errors import ClaimError, ConfigError, UserError
from arctic_plugins.frozen import FrozenLinear, FrozenModule
from arctic_plugins.testing import TracedGpu

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


@pytest.mark.parametrize(
    "base",
    [
        {"fp8": {}},
        {"fp8": {"bits": 6, "group_size": 32}},
        {"fp8": {"bits": 12}},
        {"bnb": {"double_quant": True}},
        {"bnb": {"type": "int8"}},
        {},
    ],
)
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


# Weights in host memory, on a GPU that is traced: the store is the real one.

CPU = torch.device("cpu")


def pass_over(store, gpu, weights, seconds):
    """Lease the weights in turn, forward and backward, with a computation of so many seconds for each."""
    for weight in [*weights, *reversed(weights)]:
        with weight.lease(CPU) as buffers:
            gpu.compute(seconds, *buffers.values())
            assert torch.equal(buffers[""], weight.kept[""])


def host_weights(gpu, ahead, sizes):
    store = HostStore(ahead, gpu)
    return store, [
        store.hold(f"layers.{index}.weight", {"": torch.full((size,), index % 251, dtype=torch.uint8)})
        for index, size in enumerate(sizes)
    ]


def test_host_memory_is_pinned_once_without_a_second_copy_and_freed():
    gpu = TracedGpu()
    store = HostStore(0, gpu)
    codes, scale = torch.randint(0, 255, (1000, 33), dtype=torch.uint8), torch.rand(1000, 1)
    weight = store.hold("layer.weight", {"": codes, "_scale": scale})
    assert sum(gpu.pinned.values()) - codes.nbytes - scale.nbytes in range(512), "nothing is rounded up"
    exported = copy.deepcopy(weight).export()
    [start] = gpu.pinned
    assert start % mmap.PAGESIZE == 0
    for suffix, buffer in (("", codes), ("_scale", scale)):
        assert torch.equal(exported[suffix], buffer)
        assert start <= exported[suffix].data_ptr() < start + gpu.pinned[start], "an export is a view"
    new = store.hold("layer.weight", {"": codes + 1})
    assert len(gpu.pinned) == 2
    del weight
    assert len(gpu.pinned) == 2, "a view keeps it"
    del exported
    assert list(gpu.pinned.values()) == [new.whole.nbytes]


def test_memory_that_cannot_be_pinned_is_said_once(caplog):
    gpu = TracedGpu(pins=1)
    store, weights = host_weights(gpu, 1, [1000] * 3)
    [message] = [record.getMessage() for record in caplog.records]
    assert "layers.1.weight cannot be page-locked after 0.0 GB (out of memory (2))" in message
    pass_over(store, gpu, weights, 1e-3)
    assert not gpu.errors


@pytest.mark.parametrize("ahead", [0, 1, 3, None])
def test_copies_never_race_with_computations_and_allocate_once(ahead):
    gpu = TracedGpu(bandwidth=1e6)
    store, weights = host_weights(gpu, ahead, [1000, 4000, 200] * 3)
    pass_over(store, gpu, weights, 1e-3)
    for _ in range(4):
        pass_over(store, gpu, weights, 1e-3)
    allocated = len(gpu.allocated)
    for _ in range(3):
        pass_over(store, gpu, weights, 1e-3)
    assert len(gpu.allocated) == allocated
    with weights[0].lease(CPU) as held, weights[4].lease(CPU):  # one that outlives others
        pass_over(store, gpu, weights, 1e-3)
        gpu.compute(1e-3, held[""])
    del held
    assert not gpu.errors
    assert ahead is None or len(store.staging[CPU].ring) <= (ahead + 1) * 4096
    assert gpu.live == len(store.staging[CPU].ring)


@pytest.mark.parametrize(
    ("sizes", "compute", "expected"),
    [
        ([1000] * 8, 2e-3, 1),  # copies take half as long as computations: two slots in turn
        ([1000] * 8, 0.2e-3, 1),  # five times as long: nothing hides them
        ([100, 100, 100, 3700] * 4, 1.5e-3, 4),  # hidden on average, if the large one is begun early
    ],
)
def test_the_depth_that_hides_the_copies_is_found_by_measurement(sizes, compute, expected):
    gpu = TracedGpu(bandwidth=1e6)
    store, weights = host_weights(gpu, None, sizes)
    for _ in range(6):
        pass_over(store, gpu, weights, compute)
    assert store.prefetch.ahead == expected
    taken = {}
    for ahead in (store.prefetch.ahead, expected - 1, 7):
        again = TracedGpu(bandwidth=1e6)
        other, held = host_weights(again, ahead, sizes)
        pass_over(other, again, held, compute)
        pass_over(other, again, held, compute)
        started = again.seconds
        pass_over(other, again, held, compute)
        taken[ahead] = again.seconds - started
    assert taken[expected] <= 1.05 * taken[7] < taken[expected - 1]


def test_the_measured_ring_takes_a_fraction_of_the_device():
    sizes = [100, 100, 100, 3700] * 4
    gpu = TracedGpu(bandwidth=1e6, total=16 * 4700)  # room for one large weight and three small ones
    store, weights = host_weights(gpu, None, sizes)
    for _ in range(6):
        pass_over(store, gpu, weights, 1.5e-3)
    assert store.prefetch.ahead == 3
    assert len(store.staging[CPU].ring) <= 4700


def test_a_graph_that_is_captured_while_the_depth_is_measured():
    gpu = TracedGpu(bandwidth=1e6)
    store, weights = host_weights(gpu, None, [1000] * 4)
    for number in range(20):
        gpu.in_graph = number in (2, 3)
        pass_over(store, gpu, weights, 2e-3)
    assert not gpu.errors
    assert store.prefetch.ahead == 1, "and it is measured outside"


def traced(monkeypatch, **options):
    """Make the plugin find a GPU that is traced."""
    gpu = TracedGpu(**options)
    monkeypatch.setattr("arctic_plugins_offload.host.Gpu", lambda: gpu)
    return gpu


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
def test_training_with_weights_that_come_from_host_memory(tiny_checkpoint, monkeypatch, ratio):
    def run(options):
        torch.manual_seed(0)
        model, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "lora": {"r": 4}, **options}))
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
        losses = []
        for _ in range(8):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    expected = run({})
    gpu = traced(monkeypatch)
    assert run({"offload": {"ratio": ratio}}) == expected
    assert not gpu.errors
    assert bool(gpu.pinned) == (ratio > 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_step_with_host_memory_on_a_gpu(tiny_checkpoint, ratio):
    """Pinned without a second copy, bitwise the same, no synchronization, and a ring that does not grow."""

    def run(options):
        torch.manual_seed(0)
        stack = Stack.from_dict({"fp8": {}, "lora": {"r": 4}, **options})
        model, _ = load_model(tiny_checkpoint, stack, dtype=torch.bfloat16)
        model = model.cuda().train()
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        ids, losses, memory = IDS.cuda(), [], []
        # With a mask of two dimensions, transformers looks for padding, and waits for that.
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device="cuda").tril()
        for step in range(12):
            torch.cuda.set_sync_debug_mode("error" if step >= 8 else "default")
            try:
                loss = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            losses.append(loss.detach())
            memory.append(torch.cuda.memory_reserved())
        assert len(set(memory[8:])) == 1, "nothing is allocated any more"
        return model, torch.stack(losses).tolist()

    _, expected = run({})
    model, losses = run({"offload": {"ratio": ratio}})
    assert losses == expected
    placed = [
        weight.handle
        for module in model.modules()
        if isinstance(module, FrozenModule)
        for weight in module.frozen.values()
        if weight.handle is not None
    ]
    assert bool(placed) == (ratio > 0)
    for handle in placed:
        assert all(buffer.is_pinned() for buffer in handle.export().values())
        assert {buffer.untyped_storage().data_ptr() for buffer in handle.export().values()} == {handle.whole.data_ptr()}
    for staging in placed[0].store.staging.values() if placed else ():
        largest = max(placed[0].store.sizes.values())
        assert len(staging.ring) <= (placed[0].prefetch.ahead + 1) * (largest + 256)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generation_evaluation_and_a_graph_with_host_memory_on_a_gpu(tiny_checkpoint):
    expected, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}}))
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "offload": {"to": "host"}}))
    expected, model = expected.cuda().eval(), model.cuda().eval()
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with context():
            assert torch.equal(model(IDS.cuda()).logits, expected(IDS.cuda()).logits)
    layer, plain = model.model.layers[0].mlp.up_proj, expected.model.layers[0].mlp.up_proj
    x = torch.randn(4, layer.in_features, device="cuda", dtype=layer.compute_dtype)
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert torch.equal(y, plain(x))
        assert torch.equal(layer(x), plain(x)), "and outside the graph again"
