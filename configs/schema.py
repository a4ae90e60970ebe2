"""Every option: its default, its unit, its check. Flags of the command line have the same names."""

import math
from dataclasses import dataclass, field
from typing import Literal

MiB = 2**20
GiB = 2**30
# Of each door: the coordinator runs 4,800 calls at once, cancel and status among them.
MOST_REQUESTS = 2000


@dataclass(frozen=True, kw_only=True)
class RingConfig:
    """The ring of ranks and its messages."""

    # auto: by price; algorithm_1, algorithm_5 and empirical: the rules of arXiv 2411.01783.
    algorithm: Literal["auto", "pass_kv", "pass_q", "algorithm_1", "algorithm_5", "empirical"] = (
        "auto"
    )
    piece_bytes: int = 64 * MiB  # a longer message travels in pieces
    timeout_s: float = 600.0  # of one wait for a peer; a dead peer is noticed at once
    heartbeat_s: float = 1.0  # how often each rank is asked whether it is alive
    heartbeat_timeout_s: float = 15.0  # a rank silent for so long is lost

    def __post_init__(self) -> None:
        _positive("ring", self, "piece_bytes", "timeout_s", "heartbeat_s", "heartbeat_timeout_s")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How requests are cut into steps."""

    decode_burst_steps: int = 16  # decode steps of one plan, where no prompt is under way
    # Prefill chunks are sized so that a step takes so long; None: as measured rates advise.
    step_target_s: float | None = None
    max_queued_requests: int = 4096  # that wait; more are refused
    decode_rides: bool = True  # decode rows share a prefill's steps; false: they take turns

    def __post_init__(self) -> None:
        _positive("scheduler", self, "decode_burst_steps", "max_queued_requests")
        if self.step_target_s is not None:
            _positive("scheduler", self, "step_target_s")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """The measured rates from which steps are priced."""

    # One JSON file for each machine, model and ring. None: `ringspan` in the user's cache.
    directory: str | None = None
    refresh: bool = False  # measure at start even where a file fits


@dataclass(frozen=True, kw_only=True)
class KVStoreConfig:
    """The KV store of each host: keys and values that outlive the device.

    A tier's dtype of ``auto`` is what the device has, so nothing more is lost there.
    """

    # In shared memory, of each host; 0: no store. None: a quarter of its memory where it has
    # GPUs or keeps KV on disk, else none: on CPU device memory is host memory.
    host_memory_bytes: int | None = None
    block_tokens: int = 256  # unit of what is stored, found, evicted and recomputed
    tenant_share: float = 1.0  # of a host's store that one tenant may fill
    lease_s: float = 300.0  # after which a place that nobody returned is free again
    timeout_s: float = 5.0  # of a call to a store; after it the blocks are recomputed
    restore_min_tokens: int = 256  # fewer are recomputed
    # Of the cluster, by which tenants are kept apart. None: `ringspan` in the user's cache.
    secret_file: str | None = None
    disk_directory: str | None = None  # on each host; None: nothing is kept on disk
    disk_bytes: int = 64 * GiB  # of each host
    # TLS of what goes to other hosts; all three or none. Every host reads its own files, shows
    # its certificate and takes only those that the authorities of ssl_ca_certs have signed.
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_server_name: str | None = None  # in all hosts' certificates; None: each has its address
    host_dtype: Literal["auto", "int8", "int4", "fp8"] = "auto"
    remote_dtype: Literal["auto", "int8", "int4", "fp8"] = "auto"  # on its way to another host
    disk_dtype: Literal["auto", "int8", "int4", "fp8"] = "auto"

    def __post_init__(self) -> None:
        _positive("kv_store", self, "lease_s", "timeout_s", "disk_bytes")
        if self.host_memory_bytes is not None and self.host_memory_bytes < 0:
            raise ValueError(
                f"kv_store.host_memory_bytes must be >= 0, got {self.host_memory_bytes}"
            )
        if self.block_tokens < 16 or self.block_tokens % 16:
            raise ValueError(
                f"kv_store.block_tokens must be a multiple of 16, got {self.block_tokens}"
            )
        if not 0.0 < self.tenant_share <= 1.0:
            raise ValueError(f"kv_store.tenant_share must be in (0, 1], got {self.tenant_share}")
        if self.restore_min_tokens < 0:
            raise ValueError(
                f"kv_store.restore_min_tokens must be >= 0, got {self.restore_min_tokens}"
            )
        if self.host_memory_bytes == 0 and self.disk_directory is not None:
            raise ValueError(
                "kv_store.disk_directory needs kv_store.host_memory_bytes, got 0: blocks reach"
                " the disk by way of the host's memory"
            )
        files = (self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs)
        if None in files and set(files) != {None}:
            raise ValueError(
                "kv_store.ssl_certfile, ssl_keyfile and ssl_ca_certs go together: give all three"
            )


@dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    """How KV comes back from the stores."""

    # auto: loaded, projected from saved layer inputs or recomputed from token ids, each as far
    # as the solved plan says. load: all that is stored is loaded. recompute: nothing is.
    method: Literal["auto", "load", "recompute"] = "auto"
    # serial: the paper's objective, which sends layer inputs before all else.
    objective: Literal["pipelined", "serial"] = "pipelined"
    # Layer inputs in the stores instead of keys and values. auto: where they are fewer bytes,
    # for the share of blocks that restores fastest. both: beside keys and values.
    activations: Literal["auto", "never", "always", "both"] = "auto"
    # Makes the way from store to device slower, to stand for another machine; None: as it is.
    link_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.link_bytes_per_s is not None:
            _positive("restore", self, "link_bytes_per_s")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP and the gRPC server, and limits that hold before memory is taken."""

    host: str = "127.0.0.1"  # address to listen at
    port: int = 8000  # of HTTP; 0: any that is free
    grpc_port: int = 50051
    served_model_name: list[str] = field(default_factory=list)  # none: the directory's name
    api_key_file: str | None = None  # a key on each line, each a tenant
    ssl_certfile: str | None = None  # PEM, of HTTP and gRPC; None: no TLS
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None  # whoever comes must show a certificate signed by these
    grace_s: float = 15.0  # for running requests to end at a stop
    max_requests: int = 512  # prompts under way over HTTP; as many over gRPC
    max_answers: int = 128  # prompts times n, of one HTTP request
    max_body_bytes: int | None = None  # None: room for a prompt of the model's length
    body_timeout_s: float = 60.0  # for a body to arrive
    send_timeout_s: float = 60.0  # for a client to take a piece of a stream
    keep_alive_s: float = 5.0  # a stream is never silent for longer
    progress_s: float = 1.0  # how often a prefill's progress is told, where it is asked for
    first_wait_s: float = 1.0  # an error so soon is an HTTP status, a later one part of the stream
    retry_after_s: int = 5  # told with 429 and 503

    def __post_init__(self) -> None:
        for name in ("port", "grpc_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ValueError(f"server.{name} must be 0 to 65535, got {getattr(self, name)}")
        if self.port == self.grpc_port != 0:
            raise ValueError(f"server.port and server.grpc_port must differ, got {self.port} twice")
        if not 0 <= self.grace_s < math.inf:
            raise ValueError(f"server.grace_s must be >= 0 and finite, got {self.grace_s}")
        if not 0 < self.max_requests <= MOST_REQUESTS:
            raise ValueError(
                f"server.max_requests must be 1 to {MOST_REQUESTS}, got {self.max_requests}"
            )
        if self.max_body_bytes is not None:
            _positive("server", self, "max_body_bytes")
        _positive("server", self, "max_answers", "retry_after_s", "body_timeout_s")
        _positive("server", self, "send_timeout_s", "keep_alive_s", "progress_s", "first_wait_s")
        if not all(self.served_model_name):
            raise ValueError("server.served_model_name has a name without a character")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("server.ssl_certfile and server.ssl_keyfile go together: give both")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ValueError(
                "server.ssl_ca_certs needs server.ssl_certfile and server.ssl_keyfile: clients"
                " show certificates only over TLS"
            )


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Where the actors run."""

    # None: RAY_ADDRESS if set, else a Ray of our own on this machine.
    address: str | None = None
    # For nodes with GPUs to join a Ray cluster that is still coming up; 0: what it has now counts.
    nodes_timeout_s: float = 0.0
    placement_timeout_s: float = 30.0  # for the ranks to find their places
    start_timeout_s: float = 1800.0  # for all ranks to load their weights

    def __post_init__(self) -> None:
        _positive("ray", self, "placement_timeout_s", "start_timeout_s")
        if not 0 <= self.nodes_timeout_s < math.inf:
            raise ValueError(
                f"ray.nodes_timeout_s must be >= 0 and finite, got {self.nodes_timeout_s}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A cluster that serves one model."""

    model: str = ""  # directory of a Hugging Face checkpoint
    context_parallel_size: int = 1  # ranks of the ring
    tensor_parallel_size: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the checkpoint's
    max_model_len: int | None = None  # tokens; None: the model's, or what the KV pages hold
    gpu_memory_utilization: float = 0.9  # share of a GPU for weights and KV pages
    kv_cache_memory_bytes: int | None = None  # per rank; None: what is free
    # auto: as computed; the others take a byte a value, and are not exact.
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    page_tokens: int = 256
    enable_prefix_caching: bool = True  # answers' KV is kept for prompts that begin alike
    max_num_seqs: int = 256  # answers that run at once
    max_num_batched_tokens: int = 8192  # computed in one step, over all prompts and answers
    long_prefill_token_threshold: int = 0  # of one prompt in one step; 0: no limit of its own
    decode_block_tokens: int = 16  # so many new tokens' KV in a row stay on one rank
    max_logprobs: int = 20  # that a request may ask for at each token; -1: the whole vocabulary
    threads_per_rank: int = 0  # of torch on CPU; 0: the host's cores divided among its ranks
    ring: RingConfig = field(default_factory=RingConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    kv_store: KVStoreConfig = field(default_factory=KVStoreConfig)
    restore: RestoreConfig = field(default_factory=RestoreConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        _positive("", self, "context_parallel_size", "decode_block_tokens")
        _positive("", self, "max_num_seqs", "max_num_batched_tokens")
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size must be 1, got {self.tensor_parallel_size}: tensor"
                " parallelism is not supported yet, use context_parallel_size"
            )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"max_model_len must be >= 2, got {self.max_model_len}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        if self.kv_cache_memory_bytes is not None:
            _positive("", self, "kv_cache_memory_bytes")
        if self.page_tokens < 256 or self.page_tokens % 256:
            raise ValueError(f"page_tokens must be a multiple of 256, got {self.page_tokens}")
        if self.long_prefill_token_threshold < 0:
            raise ValueError(
                "long_prefill_token_threshold must be >= 0, got"
                f" {self.long_prefill_token_threshold}"
            )
        tiers = self.kv_store
        dtypes = (self.kv_cache_dtype, tiers.host_dtype, tiers.remote_dtype, tiers.disk_dtype)
        if self.restore.activations in ("always", "both") and set(dtypes) != {"auto"}:
            raise ValueError(
                f"restore.activations={self.restore.activations} stores nothing that is quantised:"
                " leave kv_cache_dtype and the dtypes of kv_store at auto, or use never"
            )
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs must be >= -1, got {self.max_logprobs}")
        if self.threads_per_rank < 0:
            raise ValueError(f"threads_per_rank must be >= 0, got {self.threads_per_rank}")


def _positive(section: str, config: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            key = f"{section}.{name}" if section else name
            raise ValueError(
                f"{key} must be greater than 0 and finite, got {getattr(config, name)}"
            )
