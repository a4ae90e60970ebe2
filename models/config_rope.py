"""How config.json spells rotary position embedding, in transformers 4 and 5."""

from models.families import Family
from models.json_fields import JsonFields
from models.rope import ROPE_TYPES, RopeConfig


def read_rope(fields: JsonFields, family: Family, max_position_embeddings: int) -> RopeConfig:
    """Read what transformers 5 calls rope_parameters; 4 has rope_scaling, and rope_theta beside it.

    Keys that the type does not use are ignored, as transformers ignores them.
    """
    rope = _rope_fields(fields)
    found = rope.values.get("rope_type", rope.values.get("type", "default"))
    rope_type = next((known for known in ROPE_TYPES if known == found), None)
    if rope_type is None:
        fields.refuse(f"rope type {found!r}", ", ".join(ROPE_TYPES))
    theta = rope.number("rope_theta", default=fields.number(family.keys.rope_theta, default=1e4))
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type == "linear":
        return RopeConfig(rope_type="linear", theta=theta, factor=rope.number("factor"))
    # The key beside the object comes first, as in transformers.
    original = rope.integer(_ORIGINAL, default=max_position_embeddings)
    original = fields.integer(_ORIGINAL, default=original)
    if rope_type == "llama3":
        return _llama3(rope, theta, original)
    return _yarn(rope, theta, original, default_factor=max_position_embeddings / original)


_ORIGINAL = "original_max_position_embeddings"


def read_rotary_dim(fields: JsonFields, family: Family, head_dim: int) -> int:
    """Return how many dims of a head RoPE turns; it turns them in pairs."""
    key = family.keys.rotary_fraction
    beside = fields.number(key, default=1.0)
    fraction = _rope_fields(fields).number("partial_rotary_factor", default=beside)
    if fraction != 1.0 and not family.partial_rotary:
        fields.refuse(f"{key} = {fraction}", "1.0 (all dims of a head)")
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        share = "" if rotary_dim == head_dim else f" of which RoPE turns {rotary_dim}"
        fields.refuse(f"head_dim = {head_dim}{share}", "an even number, since RoPE turns pairs")
    return rotary_dim


def _rope_fields(fields: JsonFields) -> JsonFields:
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(key, {})
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        fields.refuse(f"{key} = {values!r}", "one object of plain values for all layers")
    return JsonFields(fields.path, values)


def _llama3(rope: JsonFields, theta: float, original: int) -> RopeConfig:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse(f"high_freq_factor = {high} and low_freq_factor = {low}", "high above low")
    return RopeConfig(
        rope_type="llama3",
        theta=theta,
        factor=rope.number("factor"),
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: JsonFields, theta: float, original: int, *, default_factor: float) -> RopeConfig:
    if theta == 1.0:
        rope.refuse("rope_theta = 1", "another base for rope type 'yarn'")
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=rope.number("factor", default=default_factor),
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        attention_factor=rope.number_or_none("attention_factor"),
        mscale=rope.number_or_none("mscale"),
        mscale_all_dim=rope.number_or_none("mscale_all_dim"),
        truncate=rope.flag("truncate", default=True),
    )
