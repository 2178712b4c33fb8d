"""What `SLOTS` says of each slot is what happens, and what the document says."""

import re
from pathlib import Path

import pytest

from arctic_plugins import SLOTS, Claim, LinearSpec, Plugin, PluginConfig, Slot, Stack, hookimpl
from arctic_plugins.claims import arbitrate
from arctic_plugins.errors import ClaimError, ResolveError

OF_MODULES = [name for name, slot in SLOTS.items() if slot.scope == "module"]
OF_THE_MODEL = [name for name, slot in SLOTS.items() if slot.scope == "model"]
MODULES = {"up": LinearSpec(8, 4)}


def plugin(name, *slots, called=None):
    """One that fills ``slots`` and notes the calls of the hooks that fill the first."""

    def noted(hook):
        return hookimpl(lambda self: called.append(hook))

    hooks = {hook: noted(hook) for hook in SLOTS[slots[0]].hooks}
    return type(name, (Plugin,), {"name": name, "slots": frozenset(slots), **hooks})(PluginConfig())


@pytest.mark.parametrize("slot", OF_THE_MODEL)
def test_a_model_takes_one(slot):
    assert SLOTS[slot].exclusive
    with pytest.raises(ResolveError, match=f"'a' and 'b' both fill the slot '{slot}'"):
        Stack((plugin("a", slot), plugin("b", slot)))
    with pytest.raises(ClaimError, match=f"claims the unknown slot '{slot}'"):
        arbitrate([("a", Claim(slot, "up", 1))], MODULES)


@pytest.mark.parametrize("slot", OF_MODULES)
def test_a_module_takes_one_or_several(slot):
    claims = [("a", Claim(slot, "up", 1)), ("b", Claim(slot, "up", 2))]
    assert len(Stack((plugin("a", slot), plugin("b", slot)))) == 2
    if SLOTS[slot].exclusive:
        with pytest.raises(ClaimError, match=f"'a' and 'b' both claim up as {slot}"):
            arbitrate(claims, MODULES)
    else:
        assert arbitrate(claims, MODULES).by_slot[slot]["up"] == (1, 2)


@pytest.mark.parametrize("slot", SLOTS)
def test_what_is_left_out_is_not_called(slot, tmp_path):
    called = []
    assert ("a" in Stack((plugin("a", slot),)).to_use()) is not SLOTS[slot].training_only
    whole = Stack((plugin("a", slot, "rope" if slot == "placement" else "placement", called=called),))
    part = whole.without(slot)
    assert len(part) == 1, "it fills another slot, too"
    for stack, expected in ((whole, sorted(SLOTS[slot].hooks)), (part, [])):
        called.clear()
        for hook in SLOTS[slot].hooks:
            getattr(stack, hook)(tmp_path)
        assert sorted(called) == expected


def test_the_document_lists_them():
    text = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text()
    section = text.partition("\n## Slots\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| `.*$", section, re.MULTILINE)]
    listed = {
        name.strip("`"): Slot(
            {"each module": "module", "the model": "model"}[of],
            exclusive=plugins == "one",
            training_only=needed == "no",
            hooks=frozenset(re.findall(r"`((?:hf|vllm)_\w+)`", filled)),
        )
        for name, of, plugins, needed, filled in rows
    }
    assert listed == dict(SLOTS)
