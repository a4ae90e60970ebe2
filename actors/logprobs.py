"""From the ranks' log-probabilities to what a caller reads."""

from collections.abc import Callable, Sequence

from actors.messages import Logprob, Logprobs
from attention import Zigzag
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
    of_ranks: Sequence[TokenLogprobs], prompt_tokens: int, spell: Spell
) -> tuple[Logprobs | None, ...]:
    """Put the ranks' rows together, each rank's being its own tokens' by `Zigzag`."""
    zigzag = Zigzag(num_tokens=prompt_tokens, num_ranks=len(of_ranks))
    read: list[Logprobs | None] = [None] * prompt_tokens
    for rank, rows in enumerate(of_ranks):
        # A row is about the token after its own; the rank of the last token has one row fewer.
        for index, logprobs in zip(
            zigzag.indices(rank).tolist(), read_logprobs(rows, spell), strict=False
        ):
            read[index + 1] = logprobs
    return tuple(read)
