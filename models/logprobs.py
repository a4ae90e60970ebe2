"""Log-probabilities of tokens and of the likeliest ones beside them, from raw logits.

T = rows of logits, V = vocabulary, L = 1 + the number of likeliest tokens asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LOGITS_BYTES = 64 * 2**20  # float32 logits of a prompt that exist at a time


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """One row for each token: first the token itself, then the likeliest, best first.

    All on CPU, for they travel by Ray.
    """

    token_ids_TL: npt.NDArray[np.int32]
    logprobs_TL: npt.NDArray[np.float32]
    ranks_T: npt.NDArray[np.int32]  # of the token itself among all; 1 is the likeliest


@torch.inference_mode()
def token_logprobs(logits_TV: Tensor, ids_T: Tensor, count: int) -> TokenLogprobs:
    """Return the log-probabilities of ``ids_T`` and of each row's ``count`` likeliest (-1: all)."""
    logits_TV = logits_TV.float()
    vocab = logits_TV.shape[1]
    top_TL = logits_TV.topk(vocab if count < 0 else min(count, vocab))
    own_T1 = logits_TV.gather(1, ids_T.unsqueeze(1))
    logits_TL = torch.cat([own_T1, top_TL.values], dim=1)
    return TokenLogprobs(
        token_ids_TL=torch.cat([ids_T.unsqueeze(1), top_TL.indices], dim=1).int().cpu().numpy(),
        logprobs_TL=(logits_TL - logits_TV.logsumexp(1, keepdim=True)).cpu().numpy(),
        ranks_T=(logits_TV >= own_T1).sum(1, dtype=torch.int32).cpu().numpy(),
    )


def logprobs_in_pieces(
    logits_of: Callable[[Tensor], Tensor], hidden_TE: Tensor, ids_T: Tensor, count: int, vocab: int
) -> TokenLogprobs:
    """Return `token_logprobs` of many rows; the logits of a few of them exist at a time."""
    rows = max(1, LOGITS_BYTES // (4 * vocab))
    pieces = [
        token_logprobs(logits_of(hidden_RE), ids_R, count)
        for hidden_RE, ids_R in zip(hidden_TE.split(rows), ids_T.split(rows), strict=True)
    ]
    return join_logprobs(pieces)


def join_logprobs(pieces: Sequence[TokenLogprobs]) -> TokenLogprobs:
    """Return the rows of several results as one."""
    return TokenLogprobs(
        token_ids_TL=np.concatenate([piece.token_ids_TL for piece in pieces]),
        logprobs_TL=np.concatenate([piece.logprobs_TL for piece in pieces]),
        ranks_T=np.concatenate([piece.ranks_T for piece in pieces]),
    )
