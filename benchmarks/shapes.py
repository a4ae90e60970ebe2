"""How many operations and bytes a model of a shape takes. Plain arithmetic."""

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama without biases and with an output projection of its own."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrix products."""
        qkv = self.hidden_size * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        out = self.hidden_size * self.num_heads * self.head_dim
        return qkv + out + 3 * self.hidden_size * self.intermediate_size

    def weights_bytes(self, itemsize: int) -> int:
        """Bytes of all weights, norms left out."""
        tables = 2 * self.vocab_size * self.hidden_size
        return itemsize * (self.num_layers * self.layer_weights + tables)

    def kv_bytes(self, num_tokens: int, itemsize: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize * num_tokens

    def linear_flops(self, num_tokens: int) -> float:
        """Operations of the layers' matrix products over so many tokens."""
        return 2.0 * self.num_layers * self.layer_weights * num_tokens

    def causal_flops(self, num_tokens: int) -> float:
        """Operations of causal attention among so many tokens, in all layers."""
        return self.num_layers * attention_flops(
            num_tokens, self.num_heads, self.head_dim, causal=True
        )

    def prefill_flops(self, num_tokens: int) -> float:
        """Operations of a prefill that samples one token."""
        head = 2.0 * self.vocab_size * self.hidden_size
        return self.linear_flops(num_tokens) + self.causal_flops(num_tokens) + head

    def decode_bytes(self, context: int, itemsize: int) -> int:
        """Bytes that one token must read: each weight of a product once, and the context's KV."""
        weights = self.num_layers * self.layer_weights + self.vocab_size * self.hidden_size
        return itemsize * weights + self.kv_bytes(context, itemsize)

    def activation_bytes(self, num_tokens: int, itemsize: int) -> int:
        """About the peak bytes of a prefill beside weights and pages; it lies in RoPE or attention.

        RoPE: hidden states, their norm, fused q, k and v, and what turns q and k
        in float32. Attention: hidden states, fused q, k and v, keys and values
        apart, and the output in the model's dtype and in float32, and once more
        where its heads are put in order.
        """
        hidden = self.hidden_size * itemsize
        rotated = (self.num_heads + self.num_kv_heads) * self.head_dim
        kv = 2 * self.num_kv_heads * self.head_dim * itemsize
        out = self.num_heads * self.head_dim
        qkv = out * itemsize + kv
        widened = 4 * rotated if itemsize < 4 else 0
        in_rope = 2 * hidden + qkv + widened + 4 * rotated
        in_attention = hidden + qkv + kv + out * (itemsize + 4)
        return num_tokens * max(in_rope, in_attention)


def attention_flops(num_tokens: int, num_heads: int, head_dim: int, *, causal: bool) -> float:
    """Operations of attention of so many queries to as many keys; a causal mask leaves half."""
    full = 4.0 * num_tokens * num_tokens * num_heads * head_dim
    return full / 2 if causal else full


LLAMA_3_8B = Shape(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
NEEDLE = Shape(
    num_layers=4,
    hidden_size=256,
    intermediate_size=384,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=320,
)
TOY = Shape(
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=500,
)
