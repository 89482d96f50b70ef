"""Tables of the other namings on their own, without the libraries that they name: this file is never skipped."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from convert import clip, dit, engine, registry, umt5, vae
from convert.names_diffusers import dit_table, vae_table
from convert.names_huggingface import clip_table, umt5_table
from emv3_jax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig

DIT = DiTConfig(width=24, heads=2, layers=2, ffn=8, time_features=8, text_width=6, image_width=10)
VAE = VAEConfig(width=2, res_blocks=1)
UMT5 = UMT5Config(vocab=11, width=6, attention_width=4, heads=2, layers=2, ffn=8)
CLIP = CLIPConfig(image_size=28, width=6, heads=2, layers=3, mlp_ratio=2)


# Each model in its other naming and the released one, and its tree.
MODELS: dict[str, tuple[engine.Table, engine.Table, dict]] = {
    "dit": (dit_table(DIT), dit.BASE, registry.MODELS["dit-base"].target_tree(DIT)),
    "vae": (vae_table(VAE), vae.table(VAE), vae.target_tree(VAE)),
    "umt5": (umt5_table(UMT5), umt5.TABLE, umt5.target_tree(UMT5)),
    "clip": (clip_table(CLIP), clip.table(CLIP, "visual."), clip.target_tree(CLIP)),
    "clip without prefix": (clip_table(CLIP, ""), clip.table(CLIP), clip.target_tree(CLIP)),
}


def random_tree(shapes: dict, dtype: type) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), shapes)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_bit_for_bit(name, dtype, assert_same_tensors):
    """Parameters to either naming and back, and released tensors to the other naming and back."""
    other, released, tree = MODELS[name]
    params = random_tree(tree, dtype)
    tensors = {table.name: engine.to_torch(table, params, tree) for table in (other, released)}
    for table in (other, released):
        back = engine.to_jax(table, tensors[table.name], tree, table.name)
        jax.tree.map(np.testing.assert_array_equal, back, params)
    renamed = engine.to_torch(other, engine.to_jax(released, tensors[released.name], tree, "released"), tree)
    assert_same_tensors(renamed, tensors[other.name])


@pytest.mark.parametrize("name", MODELS)
def test_each_rule_leads_to_a_parameter(name):
    """No rule is dead but those of layers that a level of the VAE does not have."""
    other, _, tree = MODELS[name]
    paths = traverse_util.flatten_dict(tree, sep="/")
    dead = [rule.rule for rule in other.compiled if not any(rule.backwards(path) for path in paths)]
    assert all("shortcut" in rule.pattern or "time_conv" in rule.pattern for rule in dead)


@pytest.mark.parametrize("name", ["dit", "vae", "umt5", "clip"])
def test_a_missing_and_a_strange_key_are_both_named(name):
    other, _, tree = MODELS[name]
    tensors = engine.to_torch(other, random_tree(tree, np.float32), tree)
    gone = sorted(tensors)[0]
    tensors["strange.weight"] = tensors.pop(gone)
    with pytest.raises(engine.ConversionError) as caught:
        engine.to_jax(other, tensors, tree, name)
    assert sorted(caught.value.problems) == [f"missing: {gone}", "unexpected: strange.weight"]


def test_second_embedding_is_not_taken_unchecked():
    """The table alone refuses it: only after a comparison may it go."""
    table, _, tree = MODELS["umt5"]
    tensors = engine.to_torch(table, random_tree(tree, np.float32), tree)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    with pytest.raises(engine.ConversionError, match="unexpected: encoder.embed_tokens.weight"):
        engine.to_jax(table, tensors, tree, "doubled")


def test_clip_of_a_whole_model_in_an_old_file():
    """Text tower, projections, temperature, stored positions, last block: all known, none used."""
    table, _, tree = MODELS["clip"]
    tensors = engine.to_torch(table, random_tree(tree, np.float32), tree)
    more = {
        key: np.zeros(1, np.float32)
        for key in (
            "vision_model.encoder.layers.2.self_attn.q_proj.weight", "vision_model.post_layernorm.bias",
            "vision_model.embeddings.position_ids", "text_model.embeddings.token_embedding.weight",
            "text_model.embeddings.position_ids", "text_projection.weight", "visual_projection.weight", "logit_scale",
        )
    }  # fmt: skip
    params = engine.to_jax(table, tensors | more, tree, "whole")
    # Query, key and value stand side by side in one kernel, in this order.
    key = tensors["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(params["blocks"]["attention"]["qkv"]["kernel"][1][:, 6:12], key.T)
    with pytest.raises(engine.ConversionError, match=r"unexpected: vision_model\.encoder\.layers\.3"):
        engine.to_jax(table, tensors | {"vision_model.encoder.layers.3.layer_norm1.bias": key}, tree, "deeper")
