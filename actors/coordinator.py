"""The coordinator: takes requests, has the tokenizer, plans steps and drives the ranks.

An async Ray actor runs this class. Decisions are in `actors.generation` and
`actors.placement`; here they meet the ranks.
"""

import asyncio
import dataclasses
import functools
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ray
import torch.distributed as dist

from actors.answer import Answer
from actors.cluster_info import ClusterInfo, size_pool
from actors.detokenizer import AnswerText, Detokenizer
from actors.draws import BadWords, bad_word_ids, check_params
from actors.generation import Generation
from actors.messages import (
    Plan,
    PrefillPlan,
    Progress,
    Request,
    RequestMetrics,
    RequestOutput,
    StepRecord,
    StepResult,
    TokenIds,
    WorkerSpec,
)
from actors.placement import Place, place
from actors.prompt import prompt_ids
from actors.ranks import Ranks
from configs import Config
from models.config import ModelConfig, check_max_model_len, read_model_config
from models.draw import answer_seed
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer


class Coordinator:
    """One model's cluster. All methods run in one event loop; requests run one after another."""

    def __init__(
        self, config: Config, create_worker: Callable[[WorkerSpec, Any, Place], Any]
    ) -> None:
        """Only store; `start` does what can fail."""
        self._config = config
        self._create_worker = create_worker
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._running: tuple[Request, int, float] | None = None  # with its tokens and start
        self._steps = 0
        self._sequences = 0
        self._release: tuple[int, ...] = ()
        self._model: ModelConfig
        self._tokenizer: Tokenizer | None
        self._ranks: Ranks
        self._info: ClusterInfo

    async def start(self) -> ClusterInfo:
        """Place the ranks, load the model on each, allocate KV pages, form the ring.

        Raises:
            RingspanError: The checkpoint cannot be served, or the ranks cannot be placed.
        """
        config, directory = self._config, Path(self._config.model)
        self._model = await asyncio.to_thread(read_model_config, directory)
        check_max_model_len(self._model, config.max_model_len)
        device = _device(config)
        group, places = await asyncio.to_thread(
            place, config.context_parallel_size, device, config.ray.placement_timeout_s
        )
        workers = [self._create_worker(self._spec(where, device), group, where) for where in places]
        self._ranks = Ranks(workers, places, config.ring)
        # The tokenizer is read while the ranks read their weights.
        self._tokenizer, infos = await asyncio.gather(
            asyncio.to_thread(Tokenizer.load, directory),
            self._ranks.call("load", timeout_s=config.ray.start_timeout_s),
        )
        self._info = size_pool(
            config,
            self._model.max_position_embeddings,
            infos,
            places,
            has_tokenizer=self._tokenizer is not None,
        )
        num_pages = self._info.kv_capacity_tokens // config.page_tokens // len(places)
        await self._ranks.call("allocate", num_pages, timeout_s=config.ray.start_timeout_s)
        await self._form_ring()
        self._ranks.watch()
        return self._info

    async def generate(self, request: Request) -> RequestOutput:
        """Answer one request; others wait for their turn.

        Raises:
            PromptError: The prompt is empty, too long or cannot be read.
            SamplingError: A sampling parameter is not for this model.
            ClusterError: A rank was lost or a step failed.
        """
        arrival_s = time.perf_counter()
        prompt = prompt_ids(
            request, self._tokenizer, self._model.vocab_size, self._info.max_model_len
        )
        bad_words = self._read_params(request.params)
        seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        self._waiting += 1
        async with self._turn:
            self._waiting -= 1
            start_s = time.perf_counter()
            self._running = (request, len(prompt), start_s)
            try:
                answers = [
                    await self._drive(self._answer(request, prompt, bad_words, seed, index))
                    for index in range(request.params.n)
                ]
            finally:
                self._running = None
        metrics = RequestMetrics(
            queue_s=start_s - arrival_s,
            ttft_s=answers[0].first_token_s - arrival_s,
            total_s=time.perf_counter() - arrival_s,
        )
        # In a thread: a long prompt's log-probabilities are millions of objects, and heartbeats
        # must not wait for them.
        return await asyncio.to_thread(self._output, request, prompt, answers, metrics)

    async def progress(self) -> Progress | None:
        """Return how far the prefill under way has come, or None where none is."""
        if self._running is None:
            return None
        request, total_tokens, start_s = self._running
        share = await self._ranks.ask(0, "progress")
        return Progress(
            request_id=request.request_id,
            total_tokens=total_tokens,
            done_tokens=int(share * total_tokens),
            elapsed_s=time.perf_counter() - start_s,
        )

    async def status(self) -> dict[str, Any]:
        """Return what this cluster is and does, for people and programs."""
        failure = self._ranks.failure
        return {
            **dataclasses.asdict(self._info),
            "running": int(self._running is not None),
            "waiting": self._waiting,
            "steps": self._steps,
            "failure": None if failure is None else str(failure),
        }

    async def stop(self) -> None:
        """End the ranks' processes; the coordinator itself is ended by its owner."""
        if hasattr(self, "_ranks"):
            self._ranks.kill()

    async def _drive(self, answer: Answer) -> Answer:
        """Execute plans until the answer is complete."""
        generation = answer.generation
        try:
            while plan := generation.next_plan(self._steps, self._release):
                self._steps += 1
                self._release = ()
                record, results = await self._execute(plan, generation.cached_tokens)
                answer.take(record, results, plan.sampling_rank)
        finally:
            self._release += (generation.sequence_id,)
        return answer

    async def _execute(self, plan: Plan, cached_tokens: int) -> tuple[StepRecord, list[StepResult]]:
        start_s = time.perf_counter()
        # A long prompt is put into the object store once, not once for every rank.
        is_prefill = isinstance(plan, PrefillPlan)
        sent = ray.put(plan) if is_prefill else plan
        # No limit on a step as a whole: a dead or silent rank ends it through its heartbeat.
        results = await self._ranks.call("execute", sent, timeout_s=None)
        token_ids = results[plan.sampling_rank].token_ids
        record = StepRecord(
            number=plan.number,
            phase="prefill" if is_prefill else "decode",
            sequence_ids=(plan.sequence_id,),
            new_tokens=len(plan.token_ids) if isinstance(plan, PrefillPlan) else len(token_ids),
            cached_tokens=cached_tokens,
            algorithm=plan.algorithm if isinstance(plan, PrefillPlan) else "all_gather",
            num_ranks=len(results),
            predicted_s=None,
            wall_s=time.perf_counter() - start_s,
            ranks_wall_s=tuple(result.wall_s for result in results),
            ranks_parts_s=tuple(result.parts_s for result in results),
        )
        return record, results

    async def _form_ring(self) -> None:
        """Host the rendezvous here: a store in a rank would die with it."""
        ring = self._config.ring
        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        await self._ranks.call(
            "connect",
            host,
            self._store.port,
            0,
            ring_timeout_s=ring.timeout_s,
            piece_bytes=ring.piece_bytes,
            timeout_s=self._config.ray.start_timeout_s,
        )

    def _read_params(self, params: SamplingParams) -> BadWords:
        check_params(
            params,
            vocab_size=self._model.vocab_size,
            max_logprobs=self._config.max_logprobs,
            has_tokenizer=self._tokenizer is not None,
        )
        if self._tokenizer is None:
            return ()
        return bad_word_ids(params, self._tokenizer, self._model.vocab_size)

    def _answer(
        self, request: Request, prompt: TokenIds, bad_words: BadWords, seed: int, index: int
    ) -> Answer:
        self._sequences += 1
        text = self._answer_text(request.params, prompt)
        generation = Generation(
            sequence_id=self._sequences,
            prompt=prompt,
            params=request.params,
            seed=answer_seed(seed, index),
            eos_ids=self._model.eos_token_ids,
            num_ranks=self._info.num_ranks,
            max_model_len=self._info.max_model_len,
            decode_block_tokens=self._config.decode_block_tokens,
            burst_steps=self._config.scheduler.decode_burst_steps,
            bad_words=bad_words,
            text=text,
            wants_prompt_logprobs=index == 0,
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

    def _output(
        self, request: Request, prompt: TokenIds, answers: list[Answer], metrics: RequestMetrics
    ) -> RequestOutput:
        spell = functools.cache(self._spell)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.text,
            prompt_token_ids=tuple(prompt.tolist()),
            outputs=tuple(answer.completion(i, spell) for i, answer in enumerate(answers)),
            num_cached_tokens=0,
            metrics=metrics,
            steps=tuple(record for answer in answers for record in answer.records),
            prompt_logprobs=answers[0].prompt_logprobs(len(prompt), spell),
        )

    def _spell(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _spec(self, where: Place, device: Literal["cpu", "cuda"]) -> WorkerSpec:
        config = self._config
        cores = os.cpu_count() or 1
        return WorkerSpec(
            rank=where.rank,
            num_ranks=config.context_parallel_size,
            checkpoint=config.model,
            device=device,
            dtype=config.dtype,
            page_tokens=config.page_tokens,
            threads=config.threads_per_rank or max(1, cores // where.ranks_on_host),
            ranks_on_host=where.ranks_on_host,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        )


def _device(config: Config) -> Literal["cpu", "cuda"]:
    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
