"""POST /tokenize and POST /detokenize, in vLLM's shapes."""

from actors.texts import Text
from cluster.http.answering import Server
from cluster.http.bodies import Detokenized, Tokenized
from cluster.http.protocol import DetokenizeRequest, TokenizeRequest


async def tokenize(server: Server, asked: TokenizeRequest) -> Tokenized:
    """Return the tokens of a text or a conversation."""
    server.model_name(asked.model)
    special = asked.add_special_tokens
    messages = asked.messages
    tokens = await server.backend.tokenize(
        Text(
            text=asked.prompt,
            messages=None
            if messages is None
            else tuple(message.for_template() for message in messages),
            add_special_tokens=messages is None if special is None else special,
            add_generation_prompt=asked.add_generation_prompt,
            with_strings=asked.return_token_strs,
        )
    )
    return Tokenized(
        count=len(tokens.token_ids),
        max_model_len=server.backend.facts.max_model_len,
        tokens=list(tokens.token_ids),
        token_strs=None if tokens.strings is None else list(tokens.strings),
    )


async def detokenize(server: Server, asked: DetokenizeRequest) -> Detokenized:
    """Return the text of tokens."""
    server.model_name(asked.model)
    return Detokenized(prompt=await server.backend.detokenize(asked.tokens))
