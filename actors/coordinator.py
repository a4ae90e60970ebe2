"""The coordinator: takes requests, has the tokenizer, plans steps and drives the ranks.

An async Ray actor runs this class. Decisions are in `actors.scheduler` and
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

from actors.answer import Answer, joint_records, step_record
from actors.choice import Chooser
from actors.cluster_info import ClusterInfo, size_pool
from actors.detokenizer import AnswerText, Detokenizer
from actors.device_cache import DeviceCache
from actors.draws import BadWords, bad_word_ids, check_params
from actors.generation import Generation
from actors.messages import (
    PrefillPlan,
    Progress,
    Request,
    RequestMetrics,
    RequestOutput,
    TokenIds,
    WorkerSpec,
)
from actors.placement import Place, place
from actors.profile_file import ProfileFacts, ProfileFile, host_numbers
from actors.prompt import prompt_ids
from actors.ranks import Ranks
from actors.scheduler import Scheduler, Step
from actors.trace import Trace, Tracer
from actors.worker import DTYPES
from configs import Config
from models.config import ModelConfig, check_max_model_len, read_model_config
from models.draw import answer_seed
from models.rates import ModelShape, Rates, model_shape
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer


class Coordinator:
    """One model's cluster. All methods run in one event loop."""

    def __init__(
        self, config: Config, create_worker: Callable[[WorkerSpec, Any, Place], Any]
    ) -> None:
        """Only store; `start` does what can fail."""
        self._config = config
        self._create_worker = create_worker
        self._work = asyncio.Event()  # set where the scheduler may have something to do
        self._runner: asyncio.Task[None] | None = None
        self._prefill: tuple[Step, float] | None = None  # under way, with its start
        self._answers: dict[int, Answer] = {}  # not complete, by sequence
        self._sequences = 0
        self._tracer = Tracer()
        self._model: ModelConfig
        self._tokenizer: Tokenizer | None
        self._ranks: Ranks
        self._info: ClusterInfo
        self._scheduler: Scheduler

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
        self._scheduler = self._make_scheduler(num_pages, await self._find_rates())
        self._ranks.watch()
        self._runner = asyncio.create_task(self._run())
        return self._info

    async def generate(self, request: Request) -> RequestOutput:
        """Answer one request, beside others.

        Raises:
            PromptError: The prompt is empty, too long or cannot be read.
            SamplingError: A sampling parameter is not for this model.
            ClusterError: A rank was lost or a step failed.
        """
        arrival_s = time.perf_counter()
        if self._ranks.failure is not None:
            raise self._ranks.failure
        prompt = prompt_ids(
            request, self._tokenizer, self._model.vocab_size, self._info.max_model_len
        )
        bad_words = self._read_params(request.params)
        seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        answers = [
            self._answer(request, prompt, bad_words, seed, index)
            for index in range(request.params.n)
        ]
        for answer in answers:
            self._scheduler.add(answer.generation)
            self._answers[answer.generation.sequence_id] = answer
        self._work.set()
        await asyncio.gather(*(answer.done for answer in answers))
        metrics = RequestMetrics(
            queue_s=answers[0].begin_s - arrival_s,
            ttft_s=answers[0].first_token_s - arrival_s,
            total_s=time.perf_counter() - arrival_s,
        )
        # In a thread: a long prompt's log-probabilities are millions of objects, and heartbeats
        # must not wait for them.
        return await asyncio.to_thread(self._output, request, prompt, answers, metrics)

    async def progress(self) -> Progress | None:
        """Return how far the prefill under way has come, or None where none is."""
        if self._prefill is None:
            return None
        step, start_s = self._prefill
        share = await self._ranks.ask(0, "progress")
        return Progress(
            total_tokens=step.cached_tokens + step.new_tokens,
            done_tokens=step.cached_tokens + int(share * step.new_tokens),
            elapsed_s=time.perf_counter() - start_s,
        )

    async def reset_prefix_cache(self) -> None:
        """Give up the KV of all answers that are complete."""
        self._scheduler.cache.clear()

    async def status(self) -> dict[str, Any]:
        """Return what this cluster is and does, for people and programs."""
        failure = self._ranks.failure
        return {
            **dataclasses.asdict(self._info),
            "running": self._scheduler.num_running,
            "waiting": self._scheduler.num_waiting,
            "steps": self._scheduler.num_steps,
            "kept_sequences": self._scheduler.cache.num_kept,
            "kept_tokens": self._scheduler.cache.kept_tokens,
            "failure": None if failure is None else str(failure),
        }

    async def start_trace(self) -> None:
        """See `actors.trace.Tracer.start`."""
        await self._tracer.start(self._ranks, self._info.num_ranks)

    async def stop_trace(self) -> Trace:
        """See `actors.trace.Tracer.stop`."""
        return await self._tracer.stop(self._ranks, self._info)

    async def stop(self) -> None:
        """End the ranks' processes; the coordinator itself is ended by its owner."""
        if self._runner is not None:
            self._runner.cancel()
        if hasattr(self, "_ranks"):
            self._ranks.kill()

    async def _run(self) -> None:
        """Execute step after step while there is something to do."""
        while True:
            await self._work.wait()
            step = self._scheduler.next_step()
            if step is None:
                self._work.clear()
                continue
            try:
                await self._execute(step)
            except Exception as error:  # whoever waits is told, by the coordinator's own caller
                for answer in self._answers.values():
                    answer.fail(error)
                return

    async def _execute(self, step: Step) -> None:
        plan, start_s = step.plan, time.perf_counter()
        answers = [self._answers[each.sequence_id] for each in step.generations]
        is_prefill = isinstance(plan, PrefillPlan)
        if is_prefill:
            self._prefill = step, start_s
        for answer in answers:
            answer.begin_s = answer.begin_s or start_s
        # A long prompt is put into the object store once, not once for every rank.
        sent = ray.put(plan) if is_prefill else plan
        # No limit on a step as a whole: a dead or silent rank ends it through its heartbeat.
        results = await self._ranks.call("execute", sent, timeout_s=None)
        self._prefill = None
        done = self._scheduler.advance(step, results)
        record = step_record(step, results, time.perf_counter() - start_s)
        self._tracer.add(start_s, record, results)
        for index, answer in enumerate(answers):
            answer.take(record, [result.sequences[index] for result in results])
        for generation in done:
            self._answers.pop(generation.sequence_id).complete()

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
            timeout_s=self._config.ray.start_timeout_s,
        )

    async def _find_rates(self) -> Rates:
        """Return what this ring does in a second, as measured now or by an earlier start."""
        config, workers = self._config, self._info.workers
        file = ProfileFile(
            config.profile.directory,
            ProfileFacts(
                devices=tuple(worker.device_name for worker in workers),
                hosts=host_numbers(self._info.hosts),
                threads=config.threads_per_rank,
                dtype=workers[0].dtype,
                model=self._shape(),
            ),
        )
        rates = None if config.profile.refresh else await asyncio.to_thread(file.load)
        if rates is None:
            measured = await self._ranks.call("profile", timeout_s=config.ray.start_timeout_s)
            rates = measured[0]
            await asyncio.to_thread(file.save, rates)
        return rates

    def _shape(self) -> ModelShape:
        return model_shape(self._model, DTYPES[self._info.workers[0].dtype].itemsize)

    def _make_scheduler(self, num_pages: int, rates: Rates) -> Scheduler:
        config = self._config
        cache = DeviceCache(
            num_ranks=self._info.num_ranks,
            num_pages=num_pages,
            page_tokens=config.page_tokens,
            shares=config.enable_prefix_caching,
        )
        return Scheduler(
            cache,
            Chooser(config.ring.algorithm, self._shape(), rates, self._info.num_ranks),
            decode_block_tokens=config.decode_block_tokens,
            burst_steps=config.scheduler.decode_burst_steps,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
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
            max_model_len=self._info.max_model_len,
            cache_salt=request.cache_salt,
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
            num_cached_tokens=answers[0].generation.num_cached_tokens,
            metrics=metrics,
            steps=joint_records(answers),
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
            piece_bytes=config.ring.piece_bytes,
            threads=config.threads_per_rank or max(1, cores // where.ranks_on_host),
            ranks_on_host=where.ranks_on_host,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        )


def _device(config: Config) -> Literal["cpu", "cuda"]:
    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
