"""From sampling parameters to what the ranks choose tokens by, or to one sentence on why not."""

from actors.messages import Draw
from models.draw import Filters
from models.errors import SamplingError
from models.logits import LogitRules
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer

BadWords = tuple[tuple[int, ...], ...]


def check_params(
    params: SamplingParams, *, vocab_size: int, max_logprobs: int, has_tokenizer: bool
) -> None:
    """Refuse what this model or this cluster cannot do.

    Raises:
        SamplingError: A token id outside the vocabulary, more log-probabilities than
            are allowed, or words where there is no tokenizer.
    """
    for name, ids in {
        "stop_token_ids": tuple(params.stop_token_ids or ()),
        "logit_bias": tuple(params.logit_bias or ()),
    }.items():
        wrong = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
        if wrong:
            raise SamplingError(
                f"{name} must hold ids of the vocabulary of {vocab_size} tokens, got {wrong[0]}"
            )
    allowed = vocab_size if max_logprobs < 0 else max_logprobs
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if (vocab_size if count == -1 else count or 0) > allowed:
            raise SamplingError(
                f"{name} must be at most {allowed} here, got {count}: raise max_logprobs of the"
                " cluster (-1: no limit)"
            )
    for name in ("stop", "bad_words"):
        if getattr(params, name) and not has_tokenizer:
            raise SamplingError(
                f"{name} must be left out with this checkpoint, got {getattr(params, name)}: it has"
                " no tokenizer files"
            )


def bad_word_ids(params: SamplingParams, tokenizer: Tokenizer, vocab_size: int) -> BadWords:
    """Return each word's token ids, at the begin of a text and after a space.

    As in vLLM the second form counts only where it is other tokens, just as many:
    a longer one begins with a bare space and may be no word of its own.

    Raises:
        SamplingError: A word has no tokens, or tokens that the model has not.
    """
    found: list[tuple[int, ...]] = []
    for word in params.bad_words or ():
        plain, spaced = (
            tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False))
            for space in ("", " ")
        )
        if not plain or max(plain) >= vocab_size:
            raise SamplingError(
                f"bad_words must be words that this model's tokens can spell, got {word!r}"
            )
        found.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return tuple(dict.fromkeys(found))


def make_draw(
    params: SamplingParams, seed: int, eos_ids: tuple[int, ...], bad_words: BadWords = ()
) -> Draw:
    """Return what the ranks need to know; the parts that change nothing are left out."""
    stop_token_ids = tuple(params.stop_token_ids or ())
    filters = Filters(top_k=max(0, params.top_k), top_p=params.top_p, min_p=params.min_p)
    rules = LogitRules(
        bad_words=bad_words,
        min_tokens=params.min_tokens,
        # EOS is barred even where it would not end the answer, as in vLLM.
        ending_ids=(*eos_ids, *stop_token_ids) if params.min_tokens else (),
        logit_bias=tuple((params.logit_bias or {}).items()),
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
    )
    ends = (() if params.ignore_eos else eos_ids) + stop_token_ids
    return Draw(
        temperature=params.temperature,
        seed=seed,
        stop_ids=tuple(dict.fromkeys(ends)),
        filters=None if filters == Filters() or params.temperature == 0.0 else filters,
        rules=None if rules == LogitRules() else rules,
        logprobs=params.logprobs,
    )
