"""From a request to the answers that are to be made of it, and from these to what a caller gets."""

import asyncio
import dataclasses
import functools
import itertools
import secrets
import time

import numpy as np

from actors.answer import Answer, joint_records, joint_restored
from actors.detokenizer import AnswerText, Detokenizer
from actors.draws import BadWords, bad_word_ids, check_params
from actors.generation import Generation
from actors.logprobs import Spell
from actors.messages import (
    PromptReport,
    Request,
    RequestDelta,
    RequestMetrics,
    RequestOutput,
    StepReport,
    TokenIds,
)
from actors.prompt import prompt_ids
from actors.texts import Text, tokenize
from models.config import ModelConfig
from models.draw import answer_seed
from models.errors import PromptError, SamplingError
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer

SHORT_TEXT = 4096  # characters: encoded in about a millisecond


class OpenRequest:
    """A request under way. Lives in the coordinator's event loop."""

    def __init__(
        self,
        request: Request,
        prompt: TokenIds,
        answers: list[Answer],
        spell: Spell,
        arrival_s: float,
    ) -> None:
        """Take its answers, none of which has begun, what spells a token, and when it came."""
        self.request = request
        self.prompt = prompt
        self.answers = answers
        self._spell = spell
        self._to_end = len(answers)  # that a stream has not heard the end of
        self.arrival_s = arrival_s
        self.is_streamed = False
        self.prompt_is_told = False  # to a stream
        self.furthest = 0  # prompt tokens told to be computed: progress never goes back
        self.news: asyncio.Queue[RequestDelta | Exception] = asyncio.Queue()

    def tell(self, answer: Answer) -> None:
        """Let a stream have what is new of an answer."""
        if not self.is_streamed:
            return
        index = self.answers.index(answer)
        delta = answer.delta(self.request.request_id, index, self._spell)
        if delta is None:
            return
        self._to_end -= delta.finish_reason is not None
        if not self._to_end:
            delta = dataclasses.replace(delta, metrics=self.metrics())
        self.news.put_nowait(delta)

    def fail(self, error: Exception) -> None:
        """Tell whoever waits that there will be no answer."""
        self.news.put_nowait(error)
        for answer in self.answers:
            answer.fail(error)

    def metrics(self) -> RequestMetrics:
        """Return the times of a complete request."""
        now_s = time.perf_counter()
        begin_s = min((a.begin_s for a in self.answers if a.begin_s), default=now_s)
        first_s = min((a.first_token_s for a in self.answers if a.first_token_s), default=now_s)
        return RequestMetrics(
            queue_s=begin_s - self.arrival_s,
            ttft_s=first_s - self.arrival_s,
            total_s=now_s - self.arrival_s,
        )


class RequestReader:
    """Reads requests for one model, and spells its answers."""

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int,
        max_logprobs: int,
    ) -> None:
        """Take the model, and its tokenizer where its checkpoint has one."""
        self._model = model
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._max_logprobs = max_logprobs
        self._sequence_ids = itertools.count(1)

    async def with_tokens(self, request: Request) -> Request:
        """Return a request that is quick to read: a conversation or a long text is token ids.

        In a thread: the checkpoint's template may take seconds, a million tokens of text as well.

        Raises:
            PromptError: The text is no Unicode, or the template does not take the conversation.
        """
        if self._tokenizer is None:
            return request  # `read` says what is wrong
        if request.messages is not None:
            text = Text(messages=request.messages, add_special_tokens=False)
        elif request.text is not None and len(request.text) > SHORT_TEXT:
            text = Text(text=request.text)
        else:
            return request
        tokens = await asyncio.to_thread(tokenize, self._tokenizer, text)
        ids = np.asarray(tokens.token_ids, dtype=np.int32)
        return dataclasses.replace(request, messages=None, token_ids=ids)

    def read(self, request: Request, arrival_s: float) -> OpenRequest:
        """Return a request's answers, none of which has begun; it came at ``arrival_s``.

        Raises:
            PromptError: The prompt is empty, too long or cannot be read.
            SamplingError: A sampling parameter is not for this model.
        """
        prompt = prompt_ids(request, self._tokenizer, self._model.vocab_size, self._max_model_len)
        params = request.params
        bad_words = self._read_params(params)
        self._check_answer_ids(request)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        answers = [
            self._answer(request, prompt, bad_words, answer_seed(seed, index), index)
            for index in range(params.n)
        ]
        return OpenRequest(request, prompt, answers, self._spell, arrival_s)

    def output(self, opened: OpenRequest) -> RequestOutput:
        """Return what a complete request has come to."""
        spell = functools.cache(self._spell)
        answers = opened.answers
        return RequestOutput(
            request_id=opened.request.request_id,
            prompt=opened.request.text,
            prompt_token_ids=tuple(opened.prompt.tolist()),
            outputs=tuple(answer.completion(i, spell) for i, answer in enumerate(answers)),
            num_cached_tokens=answers[0].generation.num_cached_tokens,
            metrics=opened.metrics(),
            prompt_logprobs=self.prompt_report(opened).logprobs,
            **vars(self.step_report(opened)),
        )

    def prompt_report(self, opened: OpenRequest) -> PromptReport:
        """Return what is known of a prompt that was computed."""
        spell = functools.cache(self._spell)
        logprobs = opened.answers[0].prompt_logprobs(len(opened.prompt), spell)
        return PromptReport(token_ids=opened.prompt, logprobs=logprobs)

    def with_reports(self, opened: OpenRequest, delta: RequestDelta) -> RequestDelta:
        """Return a delta of a stream with the reports that are due with it."""
        if delta.index == 0 and not opened.prompt_is_told:
            opened.prompt_is_told = True
            delta = dataclasses.replace(delta, prompt=self.prompt_report(opened))
        if delta.metrics is not None:
            delta = dataclasses.replace(delta, report=self.step_report(opened))
        return delta

    def step_report(self, opened: OpenRequest) -> StepReport:
        """Return how a complete request came about."""
        return StepReport(
            steps=joint_records(opened.answers), restored=joint_restored(opened.answers)
        )

    def _check_answer_ids(self, request: Request) -> None:
        if request.answer_ids and request.params.n != 1:
            raise SamplingError(
                f"n must be 1 where an answer is continued, got {request.params.n}: continue each"
                " answer by a request of its own"
            )
        if request.answer_ids and request.params.prompt_logprobs is not None:
            raise SamplingError("prompt_logprobs must be left out where an answer is continued")
        vocab_size = self._model.vocab_size
        wrong = [token_id for token_id in request.answer_ids if not 0 <= token_id < vocab_size]
        if wrong:
            raise PromptError(
                f"token id {wrong[0]} of answer_ids is outside the vocabulary of"
                f" {vocab_size} tokens"
            )

    def _read_params(self, params: SamplingParams) -> BadWords:
        check_params(
            params,
            vocab_size=self._model.vocab_size,
            max_logprobs=self._max_logprobs,
            has_tokenizer=self._tokenizer is not None,
        )
        if self._tokenizer is None:
            return ()
        return bad_word_ids(params, self._tokenizer, self._model.vocab_size)

    def _answer(
        self, request: Request, prompt: TokenIds, bad_words: BadWords, seed: int, index: int
    ) -> Answer:
        text = self._answer_text(request.params, prompt)
        generation = Generation(
            sequence_id=next(self._sequence_ids),
            prompt=prompt,
            params=request.params,
            seed=seed,
            eos_ids=self._model.eos_token_ids,
            max_model_len=self._max_model_len,
            cache_salt=request.cache_salt,
            priority=request.priority,
            bad_words=bad_words,
            text=text,
            wants_prompt_logprobs=index == 0,
            answer_ids=request.answer_ids,
        )
        return Answer(generation, text)

    def _answer_text(self, params: SamplingParams, prompt: TokenIds) -> AnswerText | None:
        if self._tokenizer is None:
            return None
        decode = functools.partial(
            self._tokenizer.decode, skip_special_tokens=params.skip_special_tokens
        )
        return AnswerText(
            Detokenizer(decode, prompt),
            stop=tuple(params.stop or ()),
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _spell(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        return self._tokenizer.decode([token_id], skip_special_tokens=False)
