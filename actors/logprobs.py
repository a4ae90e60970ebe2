"""From the ranks' log-probabilities to what a caller reads."""

from collections.abc import Callable, Sequence

from actors.messages import Logprob, Logprobs, PrefillChunk
from models.logprobs import TokenLogprobs

Spell = Callable[[int], str | None]  # a token's text

# A logit that overflowed has no number that JSON can write; vLLM's server has this one too.
LOWEST = -9999.0


def read_logprobs(rows: TokenLogprobs, spell: Spell) -> list[Logprobs]:
    """Return the log-probabilities of each row: the token's own first, then the likeliest."""
    read: list[Logprobs] = []
    for token_ids, logprobs, rank in zip(
        rows.token_ids_TL.tolist(), rows.logprobs_TL.tolist(), rows.ranks_T.tolist(), strict=True
    ):
        # The token may be one of the likeliest: its rank there is its place among equals.
        ranks = [rank, *range(1, len(token_ids))]
        read.append(
            {
                token_id: Logprob(
                    logprob=max(LOWEST, logprob), rank=place, decoded_token=spell(token_id)
                )
                for token_id, logprob, place in zip(token_ids, logprobs, ranks, strict=True)
            }
        )
    return read


def read_prompt_logprobs(
    chunks: Sequence[tuple[PrefillChunk, Sequence[TokenLogprobs | None]]],
    prompt_tokens: int,
    spell: Spell,
) -> tuple[Logprobs | None, ...]:
    """Put chunks' rows together: of each chunk those of every rank, which are its own tokens'."""
    read: list[Logprobs | None] = [None] * prompt_tokens
    for chunk, of_ranks in chunks:
        for rank, rows in enumerate(of_ranks):
            if rows is None:
                continue
            indices = range(len(chunk.token_ids))
            own = chunk.zigzag().indices(rank).tolist() if chunk.home is None else indices
            # A row is about the token after its own; behind the prompt's last there is none.
            for index, logprobs in zip(own, read_logprobs(rows, spell), strict=False):
                read[chunk.start + index + 1] = logprobs
    return tuple(read)
