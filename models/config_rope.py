"""How config.json spells rotary position embedding, in transformers 4 and 5."""

from models.json_fields import JsonFields
from models.rope import ROPE_TYPES, RopeConfig


def read_rope(fields: JsonFields, max_position_embeddings: int) -> RopeConfig:
    """Read what transformers 5 calls rope_parameters; 4 has rope_scaling, and rope_theta beside it.

    Keys that the type does not use are ignored, as transformers ignores them.
    """
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(key, {})
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        fields.refuse(f"{key} = {values!r}", "one object of plain values for all layers")
    rope = JsonFields(fields.path, values)
    found = rope.values.get("rope_type", rope.values.get("type", "default"))
    rope_type = next((known for known in ROPE_TYPES if known == found), None)
    if rope_type is None:
        fields.refuse(f"rope type {found!r}", ", ".join(ROPE_TYPES))
    rotated = rope.number("partial_rotary_factor", default=fields.number_or_none(_PARTIAL) or 1.0)
    if rotated != 1.0:
        fields.refuse(f"{_PARTIAL} = {rotated}", "1.0 (all dims of a head)")
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=10_000.0))
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


_PARTIAL, _ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"


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
