"""A request as a stream of messages: cut into pieces that fit one, and put together again."""

import math
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from actors.messages import Request, TokenIds
from cluster.rpc import ringspan_v1_pb2 as pb
from cluster.rpc.errors import LimitExceeded
from cluster.rpc.limits import RpcLimits
from cluster.rpc.wire import read_params, write_params
from models.errors import PromptError, SamplingError
from models.sampling import SamplingParams

PIECE_TOKENS = 2**16  # at most 10 bytes each
PIECE_CHARACTERS = 2**18  # at most 4 bytes each
MAX_ID_CHARACTERS = 256  # of request_id and cache_salt


def write_request(request: Request, attempt: int = 0) -> list[pb.GenerateRequest]:
    """Return the messages that ask for a request's answer.

    Raises:
        PromptError: A text has characters that cannot be sent, or a message is no text.
        SamplingError: A sampling parameter cannot be sent.
    """
    sampling = write_params(request.params)
    try:
        options = pb.GenerateOptions(
            request_id=request.request_id,
            sampling=sampling,
            cache_salt=request.cache_salt,
            priority=request.priority,
            deadline_s=request.deadline_s,
            attempt=attempt,
            reports=request.reports,
        )
        pieces = [*_prompt_pieces(request)] + [
            pb.GenerateRequest(answer_ids=ids) for ids in _id_pieces(request.answer_ids)
        ]
    except (ValueError, TypeError) as error:
        raise PromptError(f"the prompt or its options cannot be sent: {error}") from None
    # With the first piece: each message costs both ends a turn of their event loops.
    first = pieces[0] if pieces else pb.GenerateRequest()
    first.options.CopyFrom(options)
    return [first, *pieces[1:]]


def _prompt_pieces(request: Request) -> Iterator[pb.GenerateRequest]:
    if request.token_ids is not None:
        for ids in _id_pieces(request.token_ids.tolist()):
            yield pb.GenerateRequest(token_ids=ids)
    elif request.messages is not None:
        for message in request.messages:
            yield from _chat_pieces(message)
    else:
        for text in _text_pieces(request.text or ""):
            yield pb.GenerateRequest(text=text)


def _chat_pieces(message: dict[str, Any]) -> Iterator[pb.GenerateRequest]:
    role, content = message.get("role"), message.get("content")
    if message.keys() != {"role", "content"} or not (
        isinstance(role, str) and isinstance(content, str)
    ):
        raise PromptError(
            "a message must have a role and a content, both texts, got"
            f" {', '.join(map(str, message)) or 'nothing'}"
        )
    for number, text in enumerate(_text_pieces(content)):
        piece = pb.ChatPiece(role="" if number else role, content=text, continues=number > 0)
        yield pb.GenerateRequest(chat=piece)


def _id_pieces(ids: Sequence[int]) -> Iterator[pb.TokenIds]:
    for begin in range(0, len(ids), PIECE_TOKENS):
        yield pb.TokenIds(ids=ids[begin : begin + PIECE_TOKENS])


def _text_pieces(text: str) -> Iterator[str]:
    """Cut between characters: a piece is UTF-8 by itself. An empty text is one piece."""
    for begin in range(0, max(1, len(text)), PIECE_CHARACTERS):
        yield text[begin : begin + PIECE_CHARACTERS]


class RequestReader:
    """Puts a request together from its messages; what is too large ends it at once."""

    def __init__(self, limits: RpcLimits) -> None:
        """Have nothing yet."""
        self._limits = limits
        self._options: pb.GenerateOptions | None = None
        self._form: str | None = None  # of the prompt: the field that its pieces come in
        self._ids: list[TokenIds] = []
        self._texts: list[str] = []
        self._chat: list[tuple[str, list[str]]] = []  # role, and pieces of the content
        self._answer_ids: list[int] = []
        self._tokens = 0
        self._bytes = 0

    def take(self, message: pb.GenerateRequest) -> None:
        """Take the next message.

        Raises:
            PromptError: It does not go with those before it.
            LimitExceeded: All of them together are too large.
        """
        if self._options is None:
            if not message.HasField("options"):
                raise PromptError("the first message must have options")
            self._options = message.options
        elif message.HasField("options"):
            raise PromptError("only the first message may have options")
        form = message.WhichOneof("prompt")
        if form is not None:
            if self._form not in (None, form):
                raise PromptError(
                    f"all pieces of a prompt must be of one form, got {form} behind {self._form}"
                )
            self._form = form
            self._take_piece(message, form)
        self._count(tokens=len(message.answer_ids.ids))
        self._answer_ids += message.answer_ids.ids

    def _take_piece(self, message: pb.GenerateRequest, form: str) -> None:
        if form == "token_ids":
            self._count(tokens=len(message.token_ids.ids))
            self._ids.append(np.asarray(message.token_ids.ids, dtype=np.int32))
        elif form == "text":
            self._count(text=message.text)
            self._texts.append(message.text)
        else:
            self._take_chat(message.chat)

    def _take_chat(self, piece: pb.ChatPiece) -> None:
        self._count(text=piece.role + piece.content)
        if piece.continues:
            if not self._chat:
                raise PromptError("the first message of a chat has nothing to continue")
            self._chat[-1][1].append(piece.content)
            return
        if len(self._chat) == self._limits.max_chat_messages:
            raise LimitExceeded(
                f"a chat may have {self._limits.max_chat_messages} messages, and there are more"
            )
        self._chat.append((piece.role, [piece.content]))

    def _count(self, *, tokens: int = 0, text: str = "") -> None:
        self._tokens += tokens
        self._bytes += len(text.encode())
        if self._tokens > self._limits.max_prompt_tokens:
            raise LimitExceeded(
                f"a prompt may have {self._limits.max_prompt_tokens} tokens here, and this one has"
                " more"
            )
        if self._bytes > self._limits.max_prompt_bytes:
            raise LimitExceeded(
                f"a prompt may have {self._limits.max_prompt_bytes} bytes of text here, and this"
                " one has more"
            )

    def finish(self) -> tuple[Request, int]:
        """Return the request, and the number of earlier tries.

        Raises:
            PromptError: There is no prompt, or an option is none.
            SamplingError: A sampling parameter is outside its range.
        """
        options = self._options
        if options is None or self._form is None:
            raise PromptError("the prompt is empty: give token_ids, text or chat")
        for name in ("request_id", "cache_salt"):
            if len(getattr(options, name)) > MAX_ID_CHARACTERS:
                raise PromptError(f"{name} must have at most {MAX_ID_CHARACTERS} characters")
        deadline_s = options.deadline_s if options.HasField("deadline_s") else None
        if deadline_s is not None and not 0 < deadline_s < math.inf:
            raise PromptError(f"deadline_s must be a number greater than 0, got {deadline_s}")
        request = Request(
            request_id=options.request_id or f"rpc-{secrets.token_hex(8)}",
            text="".join(self._texts) if self._form == "text" else None,
            token_ids=np.concatenate(self._ids) if self._form == "token_ids" else None,
            messages=self._messages() if self._form == "chat" else None,
            params=self._params(options),
            cache_salt=options.cache_salt,
            priority=options.priority,
            deadline_s=deadline_s,
            answer_ids=tuple(self._answer_ids),
            reports=options.reports,
        )
        return request, options.attempt

    def _messages(self) -> tuple[dict[str, Any], ...]:
        return tuple({"role": role, "content": "".join(texts)} for role, texts in self._chat)

    def _params(self, options: pb.GenerateOptions) -> SamplingParams:
        message = options.sampling
        for name in ("stop", "bad_words", "stop_token_ids"):
            if len(getattr(message, name)) > self._limits.max_words:
                raise SamplingError(f"{name} may have at most {self._limits.max_words} entries")
        params = read_params(message)
        if params.n > self._limits.max_answers:
            raise SamplingError(f"n must be at most {self._limits.max_answers}, got {params.n}")
        if params.prompt_logprobs is not None and not options.reports:
            raise SamplingError("prompt_logprobs are told in reports: set reports in the options")
        return params
