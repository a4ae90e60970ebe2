"""Exact attention over a context whose keys lie on several ranks.

Attention over keys A and B together is a weighted mean of attention over A and
attention over B; the weights need one number per query and head, the
log-sum-exp of the scores (LSE). So every piece of work is one call

    attend(q, k, v) -> (out, lse)

over some of the keys, and partials are merged as they arrive. Partials are
float32, the LSE is the natural logarithm of the scaled scores' sum of
exponentials, and an empty set of keys is ``out = 0, lse = -inf``.

Letters in the names of tensors: T = queries on this rank, S = keys, H = query
heads, K = KV heads, J = 2K (keys' heads, then values' heads), D = head dim,
N = ranks, P = page, C = page capacity in tokens.

This package is tensor code on torch and torch.distributed. It knows no Ray, no
model and no configuration.
"""

from attention.kernel import attend
from attention.merge import merge_into, merge_stacked
from attention.paged import PagedRows, copy_page
from attention.paged_batch import PagedBatch
from attention.pass_kv import PassKVAttention
from attention.pass_q import PassQAttention
from attention.ring import ProcessGroupRing, Ring
from attention.ring_attention import RingAttention
from attention.ring_sequence import RingSequence
from attention.thread_ring import ThreadRanks
from attention.zigzag import Sight, Zigzag

__all__ = [
    "PagedBatch",
    "PagedRows",
    "PassKVAttention",
    "PassQAttention",
    "ProcessGroupRing",
    "Ring",
    "RingAttention",
    "RingSequence",
    "Sight",
    "ThreadRanks",
    "Zigzag",
    "attend",
    "copy_page",
    "merge_into",
    "merge_stacked",
]
