"""A run that is resumed with a changed recipe is the uninterrupted one with that change, or is refused in a line that
names it.
"""

import json
import shutil
from dataclasses import fields
from unittest.mock import Mock

import pytest
import torch
from arctic_plugins_huggingface import last_checkpoint
from arctic_plugins_huggingface.training import run as sft
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.resume import BATCH, EVALUATION, FREE, RECIPE, STEPS, _why_not
from arctic_plugins_huggingface.training.run import train
from rich.console import Console
from transformers import TrainerCallback
from trl import SFTConfig

from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.provenance import write_provenance
from arctic_plugins.recorded import recorded_stack

STOP, END = 5, 12  # of 10 steps in an epoch


class WeightsError(Exception):
    """They would be loaded now."""


class Stopped(TrainerCallback):
    """Ends the run after a step, with a checkpoint, as a signal would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def record(number):
    return json.dumps({"instruction": f"Say {number}.", "output": str(number)})


class House:
    """Recipes, and what became of them, in one directory; every run is made once."""

    def __init__(self, directory, checkpoint):
        self.directory, self.checkpoint = directory, checkpoint
        (directory / "data.jsonl").write_text("\n".join(map(record, range(40))))
        (directory / "eval.jsonl").write_text("\n".join(map(record, range(40, 44))))

    def recipe(self, output, changes=None):
        """The recipe with ``changes`` (section.key -> value); dropout makes it depend on every random state there
        is.
        """
        content = {
            "model": str(self.checkpoint),
            "plugins": {"fp8": {}, "lora": {"r": 4, "dropout": 0.2}},
            "load": {},
            "data": {"path": "data.jsonl", "eval_path": "eval.jsonl"},
            "training": {
                "output_dir": str(self.directory / output),
                "max_steps": END,
                "save_steps": END,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "cosine",
                "per_device_train_batch_size": 4,
                "use_cpu": True,
                "bf16": False,
            },
        }
        for key, value in (changes or {}).items():
            section, _, name = key.rpartition(".")
            (content[section] if section else content)[name] = value
        path = self.directory / f"{output}.yaml"
        path.write_text(json.dumps(content))
        return Recipe.from_file(path)

    def whole(self, changes=None):
        """The adapter of the run without a break."""
        return adapter(self._made("whole", changes))

    def stopped(self, changes=None, step=STOP):
        """The directory of a run that was cut off after ``step``; a copy."""
        made = self._made(f"stopped-{step}", changes, Stopped(step))
        shutil.rmtree(made / "final", ignore_errors=True)
        return shutil.copytree(made, self.directory / "run")

    def _made(self, kind, changes, *callbacks):
        kept, run = self.directory / f"{kind}-{json.dumps(changes or {})}".replace(".json", ""), self.directory / "run"
        shutil.rmtree(run, ignore_errors=True)
        if not kept.exists():
            train(self.recipe("run", changes), callbacks=list(callbacks))
            run.rename(kept)
        return kept

    def resume(self, changes=None):
        """What the resumed run prints."""
        console = Console(record=True, width=4000)
        train(self.recipe("run", changes), resume=True, console=console)
        return console.export_text()

    def begin(self, changes=None):
        """A resumed run comes to loading weights; or what is raised before that."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft, "load_model", Mock(side_effect=WeightsError))
            with pytest.raises(WeightsError):
                self.resume(changes)


def adapter(output):
    return (output / "final" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_checkpoint):
    return House(tmp_path_factory.mktemp("house"), tiny_checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training.save_steps": 4, "training.save_total_limit": 5, "training.save_only_model": True},
        {"training.logging_steps": 3, "training.disable_tqdm": True, "training.run_name": "other"},
        {"training.eval_strategy": "no"},
        {
            "training.eval_strategy": "steps",
            "training.eval_steps": 2,
            "training.per_device_eval_batch_size": 1,
            "training.eval_on_start": True,
        },
        {"training.dataloader_num_workers": 1, "training.dataloader_prefetch_factor": 2},
        {"training.gradient_checkpointing": True},
        {"training.gradient_checkpointing": True, "training.gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"data.eval_path": "data.jsonl"},
        {"nonfinite": "skip"},
        {"plugins": {"fp8": {}, "lora": {"r": 4, "dropout": 0.2}, "offload": {}}},
        {"training.num_train_epochs": 7},
    ],
    ids=lambda changes: ",".join(changes) or "nothing",
)
def test_what_changes_no_number_is_taken_and_said(house, changes):
    whole, output = house.whole(), house.stopped()
    text = house.resume(changes)
    assert adapter(output) == whole
    assert all(f"{key} " in text for key in changes if key != "plugins")
    assert ("was made with a different recipe; from here on: " in text) == bool(
        {*changes} - {"plugins"}
    ) or "plugins.offload" in text
    if "training.save_steps" in changes:
        assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-8", "checkpoint-12"}
    if "training.logging_steps" in changes:
        state = json.loads((output / f"checkpoint-{END}" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6, 9, 12]
    if "training.eval_steps" in changes:
        state = json.loads((output / f"checkpoint-{END}" / "trainer_state.json").read_text())
        assert {6, 8, 10} <= {entry["step"] for entry in state["log_history"] if "eval_loss" in entry}
    values = json.loads((output / f"checkpoint-{END}" / RECIPE).read_text())["values"]
    assert all(values[key] == value for key, value in changes.items() if key.startswith("training")), (
        "the next resume compares with this recipe"
    )


@pytest.mark.parametrize(
    ("schedule", "before", "after"),
    [
        ({"training.lr_scheduler_type": "constant"}, {"training.max_steps": STOP}, {"training.max_steps": END}),
        ({"training.lr_scheduler_type": "constant"}, {"training.max_steps": 10}, {"training.max_steps": END}),
        ({"training.lr_scheduler_type": "constant"}, {}, {"training.max_steps": 8}),
        (
            {"training.lr_scheduler_type": "constant_with_warmup", "training.warmup_steps": 8},
            {"training.max_steps": STOP},
            {},
        ),
        ({"training.lr_scheduler_type": "inverse_sqrt", "training.warmup_steps": 3}, {"training.max_steps": STOP}, {}),
        (
            {"training.lr_scheduler_type": "constant", "training.max_steps": -1},
            {"training.num_train_epochs": 1},
            {"training.num_train_epochs": 2},
        ),
        ({"training.lr_scheduler_type": "constant"}, {"training.max_steps": -1, "training.num_train_epochs": 1}, {}),
        ({"training.lr_scheduler_type": "constant", "data.streaming": True}, {"training.max_steps": STOP}, {}),
        (
            {"training.lr_scheduler_type": "constant", "data.packing": True, "data.max_length": 32},
            {"training.max_steps": STOP},
            {},
        ),
    ],
    ids=[
        "longer",
        "longer, from the end of an epoch",
        "shorter",
        "warmup",
        "inverse_sqrt",
        "epochs",
        "steps for epochs",
        "stream",
        "packed",
    ],
)
def test_another_end_is_taken_where_the_schedule_has_none(house, schedule, before, after):
    whole, output = house.whole({**schedule, **after}), house.stopped({**schedule, **before})
    text = house.resume({**schedule, **after})
    assert adapter(output) == whole
    assert "from here on: " in text
    assert "training.max_steps" in text or "training.num_train_epochs" in text


@pytest.mark.parametrize("step", [9, 10, 11])
@pytest.mark.parametrize("end", [11, END])
def test_a_stream_that_has_begun_anew_goes_on_where_it_was(house, step, end):
    stream = {"training.lr_scheduler_type": "constant", "data.streaming": True}
    whole, output = house.whole(stream), house.stopped({**stream, "training.max_steps": end}, step)
    house.resume(stream)
    assert adapter(output) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training.learning_rate": 1e-3},
            r"training\.learning_rate was 0\.01 and is 0\.001; expected the same; restore .* another output_dir",
        ),
        (
            {"training.learning_rate": 1e-3, "training.seed": 1},
            r"training\.learning_rate was .*, training\.seed was 42 and is 1;",
        ),
        ({"training.lr_scheduler_type": "linear"}, r"training\.lr_scheduler_type was 'cosine' and is 'linear'"),
        ({"training.warmup_steps": 3}, r"training\.warmup_steps was 0 and is 3"),
        ({"training.max_steps": 20}, r"training\.max_steps was 12 and is 20 \(the schedule 'cosine' depends on it\)"),
        ({"training.max_steps": -1}, r"training\.max_steps was 12 and is -1 \(the schedule"),
        (
            {"training.per_device_train_batch_size": 8},
            r"per_device_train_batch_size was 4 and is 8 \(their product is the batch size of a step\)",
        ),
        ({"training.gradient_accumulation_steps": 2}, r"training\.gradient_accumulation_steps was 1 and is 2"),
        ({"training.weight_decay": 0.1}, r"training\.weight_decay was"),
        ({"training.optim": "sgd"}, r"training\.optim was 'adamw"),
        ({"training.adam_beta1": 0.8}, r"training\.adam_beta1 was 0\.9 and is 0\.8"),
        ({"training.data_seed": 7}, r"training\.data_seed was not set and is 7"),
        ({"training.max_grad_norm": 0.1}, r"training\.max_grad_norm was"),
        ({"training.neftune_noise_alpha": 5.0}, r"training\.neftune_noise_alpha was not set and is 5\.0"),
        ({"training.label_smoothing_factor": 0.1}, r"training\.label_smoothing_factor was"),
        ({"training.bf16": True}, r"training\.bf16 was False and is True"),
        ({"training.eos_token": "<e>"}, r"training\.eos_token was not set and is '<e>'"),
        ({"data.loss": "all"}, r"data\.loss was 'completion' and is 'all'"),
        ({"data.max_length": 16}, r"data\.max_length was 1024 and is 16"),
        ({"data.packing": True}, r"data\.packing was False and is True"),
        ({"data.path": "eval.jsonl"}, r"data\.path was '.*data\.jsonl' \(\d+ bytes, xxh3 .*\) and is '.*eval\.jsonl'"),
        ({"data.eval_path": None, "data.eval_size": 4}, r"data\.eval_size was not set and is 4"),
        ({"load.attn_implementation": "eager"}, r"load\.attn_implementation was not set and is 'eager'"),
        (
            {
                "training.gradient_checkpointing": True,
                "training.gradient_checkpointing_kwargs": {"preserve_rng_state": False},
            },
            (
                r"training\.gradient_checkpointing was False and is True "
                r"\(gradient_checkpointing_kwargs may change the numbers\)"
            ),
        ),
        ({"load.dtype": "bfloat16"}, r"load\.dtype was not set and is 'bfloat16'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_makes_another_run_is_refused_before_weights_are_loaded(house, changes, message):
    output = house.stopped()
    with pytest.raises(
        ConfigError, match=rf"{output}/checkpoint-5 was made with a different recipe: .*{message}"
    ) as raised:
        house.begin(changes)
    assert "\n" not in str(raised.value)


def test_plugins_that_act_on_numbers_are_refused(house):
    house.stopped()
    with pytest.raises(
        ConfigError,
        match=r"than the recipe's: plugins\.fp8 was \{'bits': 8, .* and is not set, "
        r"plugins\.lora\.dropout was 0\.2 and is 0\.0;",
    ):
        house.begin({"plugins": {"lora": {"r": 4}}})


def test_an_end_before_the_checkpoint_is_refused(house):
    constant = {"training.lr_scheduler_type": "constant"}
    house.stopped(constant)
    with pytest.raises(
        ConfigError, match=r"checkpoint-5 is past the end of the run: training\.max_steps is 3; expected at least 5"
    ):
        house.begin({**constant, "training.max_steps": 3})
    with pytest.raises(
        ConfigError, match=r"past the end of the run: training\.num_train_epochs is 0\.25; expected at least 0\.5"
    ):
        house.begin({**constant, "training.max_steps": -1, "training.num_train_epochs": 0.25})
    fraction = {"training.lr_scheduler_type": "constant_with_warmup", "training.warmup_steps": 0.5}
    house.stopped(fraction)
    with pytest.raises(ConfigError, match="warmup_steps is a fraction of it"):
        house.begin({**fraction, "training.max_steps": 20})


def test_where_evaluations_decide_they_are_part_of_the_run(house):
    best = {
        "training.load_best_model_at_end": True,
        "training.eval_strategy": "steps",
        "training.eval_steps": 4,
        "training.save_steps": 4,
    }
    house.stopped(best)
    with pytest.raises(
        ConfigError, match=r"training\.eval_steps was 4 and is 2 \(the .* best model depends on evaluations\)"
    ):
        house.begin({**best, "training.eval_steps": 2})
    with pytest.raises(ConfigError, match=r"data\.eval_path was"):
        house.begin({**best, "data.eval_path": "data.jsonl"})


def test_data_are_known_by_their_content(house):
    house.stopped()
    shutil.copy(house.directory / "data.jsonl", house.directory / "moved.jsonl")
    house.begin({"data.path": "moved.jsonl"})
    text = (house.directory / "data.jsonl").read_text()
    (house.directory / "moved.jsonl").write_text(text.replace("Say 1.", "Say 7."))
    with pytest.raises(ConfigError, match=r"data\.path was .*data\.jsonl.* and is .*moved\.jsonl"):
        house.begin({"data.path": "moved.jsonl"})
    try:
        (house.directory / "data.jsonl").write_text(text.replace("Say 1.", "Say 7."))
        with pytest.raises(ConfigError, match=r"data\.path was .*data\.jsonl.* and is .*data\.jsonl"):
            house.begin()
    finally:
        (house.directory / "data.jsonl").write_text(text)


def test_a_model_is_known_by_its_content(house):
    house.stopped()
    moved = shutil.copytree(house.checkpoint, house.directory / "moved-model", dirs_exist_ok=True)
    house.begin({"model": str(moved)})
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a different recipe: model was .* and is .*moved-model"):
        house.begin({"model": str(moved)})


def test_the_same_batches_in_other_pieces(house):
    pieces = {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2}
    house.stopped()
    house.begin(pieces)
    whole = {"training.dataloader_drop_last": True}
    house.stopped(whole)
    with pytest.raises(
        ConfigError, match=r"gradient_accumulation_steps was 1 and is 2 .*per_device_train_batch_size was 4 and is 2"
    ):
        house.begin({**whole, **pieces})


def test_a_checkpoint_of_an_earlier_version_is_resumed_with_a_warning(house):
    whole, output = house.whole(), house.stopped()
    (output / "checkpoint-5" / RECIPE).unlink()
    write_provenance(output / "checkpoint-5", recorded_stack(output / "checkpoint-5").to_dict())
    text = house.resume()
    assert (
        f"warning: {output}/checkpoint-5 has no recipe.json because an earlier version made it, so the recipe "
        "cannot be compared" in text
    )
    assert adapter(output) == whole


def test_a_value_that_another_version_knew_is_no_difference_unless_it_was_given(house):
    def change(given):
        content = json.loads(path.read_text())
        del content["values"]["training.adam_epsilon"]
        content["values"]["training.[bold]gone"] = "[red]x\n"
        content["given"] += given
        path.write_text(json.dumps(content))
        write_provenance(path.parent, recorded_stack(path.parent).to_dict())

    path = house.stopped() / "checkpoint-5" / RECIPE
    change([])
    house.begin()
    path = house.stopped() / "checkpoint-5" / RECIPE
    change(["training.[bold]gone"])
    with pytest.raises(ConfigError, match=r"training\.\[bold\]gone was '\[red\]x\\n' and is not set;") as raised:
        house.begin()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "given": 3, "values": {}}',
        '{"format": 1, "given": [3], "values": {}}',
        '{"format": 1, "given": [], "values": {"processes": "many"}}',
        '{"format": 1, "given": [], "values": []}',
    ],
)
def test_a_damaged_record_is_one_line(house, content):
    directory = house.stopped() / "checkpoint-5"
    (directory / RECIPE).write_text(content)
    write_provenance(directory, recorded_stack(directory).to_dict())
    with pytest.raises(CheckpointError, match=RECIPE) as raised:
        house.begin()
    assert "\n" not in str(raised.value)


def test_secrets_are_not_recorded(house):
    output = house.stopped({"training.hub_token": "hf_secret", "load.token": "hf_secret"})
    newest, _ = last_checkpoint(output)
    assert "hf_secret" not in (newest / RECIPE).read_text()


REFUSED = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2
    adam_epsilon optim_target_modules average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16
    bf16_full_eval fp16_full_eval tf32 torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
    liger_kernel_config use_cache neftune_noise_alpha auto_find_batch_size load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed
    accelerator_config parallelism_config dataloader_drop_last dataloader_in_order remove_unused_columns label_names
    train_sampling_strategy length_column_name fsdp fsdp_config deepspeed debug model_init_kwargs trust_remote_code
    router_aux_loss_coef chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token truncation_mode
    shuffle_dataset packing_strategy padding_free pad_to_multiple_of eval_packing completion_only_loss
    assistant_only_loss loss_type activation_offloading pad_token
"""
"""Training arguments that make another run; a new one is refused as well, until somebody has thought about it and named
it here or there.
"""
NOT_RECORDED = {"hub_token", "max_length", "packing"}


def test_every_training_argument_has_been_thought_about():
    known = {field.name for field in fields(SFTConfig) if field.init}
    some = {key.removeprefix("training.") for key in (*BATCH, *STEPS)} - {"processes"}
    some |= {"gradient_checkpointing", "gradient_checkpointing_kwargs", "dataloader_num_workers"}
    groups = [FREE, EVALUATION, some, {*REFUSED.split()}, NOT_RECORDED]
    assert known == set().union(*groups)
    assert sum(map(len, groups)) == len(known), "each in one"
    values = {"lr_scheduler_type": "cosine", "load_best_model_at_end": False}
    now = {f"training.{name}": value for name, value in values.items()}
    for name in known - some - NOT_RECORDED:
        assert (_why_not(f"training.{name}", now, now) is None) == (name in FREE | EVALUATION), name
