"""From a request to the token ids of its prompt, or to one sentence on why not."""

import numpy as np

from actors.messages import Request, TokenIds
from models.errors import PromptError
from models.tokenizer import Tokenizer


def prompt_ids(
    request: Request, tokenizer: Tokenizer | None, vocab_size: int, max_model_len: int
) -> TokenIds:
    """Return the prompt's token ids, int32.

    Raises:
        PromptError: The prompt is empty, too long, holds ids outside the vocabulary,
            or is text and the checkpoint has no tokenizer.
    """
    token_ids = _encode(request, tokenizer)
    if len(token_ids) == 0:
        raise PromptError("the prompt is empty: give at least one token")
    if len(token_ids) >= max_model_len:
        raise PromptError(
            f"the prompt has {len(token_ids)} tokens, but max_model_len is {max_model_len} with at"
            " least one token of answer: shorten the prompt or raise --max-model-len"
        )
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise PromptError(f"token id {wrong} is outside the vocabulary of {vocab_size} tokens")
    return token_ids


def _encode(request: Request, tokenizer: Tokenizer | None) -> TokenIds:
    if request.token_ids is not None:
        return request.token_ids
    if tokenizer is None:
        raise PromptError(
            "this checkpoint has no tokenizer files: give the prompt as prompt_token_ids"
        )
    if request.messages is not None:
        return np.asarray(tokenizer.encode_chat(list(request.messages)), dtype=np.int32)
    if not request.text:
        raise PromptError("the prompt is empty: give at least one character")
    return np.asarray(tokenizer.encode(request.text), dtype=np.int32)
