"""Rows of log-probabilities become what a caller reads, in the order of the prompt."""

import numpy as np
import pytest
import torch

from actors.logprobs import LOWEST, read_logprobs, read_prompt_logprobs
from actors.messages import PrefillChunk
from models.logprobs import TokenLogprobs, token_logprobs

LOGITS_TV = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 0.0, 5.0]])


def spell(token_id: int) -> str:
    return f"<{token_id}>"


def test_own_token_comes_first_and_once() -> None:
    """Beside the likeliest, or among them; its rank is that among all tokens."""
    rows = token_logprobs(LOGITS_TV[:1].repeat(2, 1), torch.tensor([0, 3]), 2)
    logprobs = LOGITS_TV[0].log_softmax(-1).tolist()

    unlikely, second = read_logprobs(rows, spell)

    assert list(unlikely) == [0, 1, 3]
    assert [place.rank for place in unlikely.values()] == [4, 1, 2]
    assert list(second) == [3, 1]
    assert second[3].logprob == pytest.approx(logprobs[3], abs=1e-6)
    assert (second[3].rank, second[3].decoded_token) == (2, "<3>")


def test_only_the_own_token_where_no_others_are_asked_for() -> None:
    """Of equals the rank is the last: so many tokens are at least as likely."""
    (row,) = read_logprobs(token_logprobs(LOGITS_TV[1:], torch.tensor([3]), 0), spell)

    assert list(row) == [3]
    assert row[3].rank == 3


def test_numbers_that_json_cannot_write_are_replaced() -> None:
    """A model in 16 bit may overflow."""
    rows = TokenLogprobs(
        token_ids_TL=np.array([[1], [2]], dtype=np.int32),
        logprobs_TL=np.array([[-np.inf], [np.nan]], dtype=np.float32),
        ranks_T=np.array([1, 1], dtype=np.int32),
    )

    assert [row.popitem()[1].logprob for row in read_logprobs(rows, spell)] == [LOWEST, LOWEST]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 7, 30])
@pytest.mark.parametrize("home", [None, 0])
def test_rows_of_chunks_and_ranks_are_put_in_order(
    num_ranks: int, length: int, home: int | None
) -> None:
    """Each is about the token after its own; some ranks may have none, some chunks all on one."""
    prompt = np.arange(100, 100 + length, dtype=np.int32)
    chunks = []
    for start, end in ((0, length // 2), (length // 2, length)):
        if start == end:
            continue
        chunk = PrefillChunk(
            sequence_id=1,
            token_ids=prompt[start:end],
            cached_rows=(start, *[0] * (num_ranks - 1)),
            home=home,
            first_rank=num_ranks - 1,
            draw=None,
        )
        of_ranks = []
        for rank in range(num_ranks):
            own = chunk.zigzag().indices(rank).tolist()
            if home is not None:
                own = list(range(end - start)) if rank == home else []
            following = prompt[[start + i + 1 for i in own if start + i + 1 < length]]
            rows = TokenLogprobs(
                token_ids_TL=following[:, None],
                logprobs_TL=-following[:, None].astype(np.float32),
                ranks_T=following,
            )
            of_ranks.append(rows if home in (None, rank) else None)
        chunks.append((chunk, of_ranks))

    read = read_prompt_logprobs(chunks, length, spell)

    assert read[0] is None
    assert [next(iter(row)) for row in read[1:] if row] == prompt[1:].tolist()
    assert len(read) == length
