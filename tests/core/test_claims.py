"""Claims are settled before anything is touched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_plugins import Claim, LinearSpec
from arctic_plugins.claims import arbitrate, compress_names, matches
from arctic_plugins.errors import ClaimError

LAYERS = [
    f"model.layers.{layer}.{name}"
    for layer in range(3)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
]
MODULES = {name: LinearSpec(8, 4) for name in [*LAYERS, "lm_head"]}


def test_two_codecs_on_different_modules_are_a_stack():
    claims = arbitrate(
        [("fp8", Claim("weight_codec", "**.up_proj", "A")), ("nf4", Claim("weight_codec", "**.self_attn.*", "B"))],
        MODULES,
    )
    codecs = claims.exclusive("weight_codec")
    assert codecs["model.layers.0.mlp.up_proj"] == "A"
    assert codecs["model.layers.2.self_attn.k_proj"] == "B"
    assert "lm_head" not in codecs


def test_two_codecs_on_one_module_name_both_plugins():
    with pytest.raises(
        ClaimError, match=r"plugins 'fp8' and 'nf4' both claim model\.layers\.0\.self_attn\.q_proj as weight_codec"
    ):
        arbitrate(
            [("fp8", Claim("weight_codec", "**", "A")), ("nf4", Claim("weight_codec", "**.self_attn.*", "B"))], MODULES
        )


def test_adapters_stack_up_in_order():
    claims = arbitrate([("one", Claim("adapter", "lm_head", 1)), ("two", Claim("adapter", "lm_head", 2))], MODULES)
    assert claims.by_slot["adapter"]["lm_head"] == (1, 2)


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (Claim("weight_codecs", "**", 1), "unknown slot 'weight_codecs'"),
        (Claim("weight_codec", "nothing.*", 1), "'nothing.\\*', which matches no linear module"),
        (Claim("weight_codec", "**.q_proj", 1), "q_proj and .*k_proj and .*v_proj have different codecs"),
    ],
)
def test_claims_that_cannot_be_met(claim, message):
    with pytest.raises(ClaimError, match=message):
        arbitrate([("fp8", claim)], MODULES)


def test_star_stays_within_a_component():
    assert matches("model.layers.*.mlp", "model.layers.12.mlp")
    assert not matches("model.*.mlp", "model.layers.12.mlp")
    assert matches("model.**.mlp", "model.layers.12.mlp")
    assert not matches("modelXlayers", "model.layers")


@given(owned=st.dictionaries(st.sampled_from(list(MODULES)), st.sampled_from("AB")))
def test_compressed_names_say_exactly_the_same(owned):
    patterns = compress_names(owned, MODULES)
    for name in MODULES:
        assert [owner for pattern, owner in patterns.items() if matches(pattern, name)] == (
            [owned[name]] if name in owned else []
        )


def test_layers_that_agree_become_one_pattern():
    assert compress_names(dict.fromkeys(LAYERS, "fp8"), MODULES)["model.layers.*.mlp.up_proj"] == "fp8"
