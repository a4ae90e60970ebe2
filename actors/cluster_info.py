"""What a cluster is once its ranks have loaded the model, and how many KV pages each gets."""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.errors import PlacementError
from actors.messages import WorkerInfo
from actors.placement import Place
from configs import Config

CPU_CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """What a cluster is, once it is up."""

    model: str
    num_ranks: int
    hosts: tuple[str, ...]  # of each rank
    workers: tuple[WorkerInfo, ...]
    max_model_len: int
    kv_capacity_tokens: int  # over all ranks
    has_tokenizer: bool


def size_pool(
    config: Config,
    max_position_embeddings: int,
    infos: Sequence[WorkerInfo],
    places: Sequence[Place],
    *,
    has_tokenizer: bool,
) -> ClusterInfo:
    """Give every rank the pages that fit; on CPU not more than are asked for or of use.

    One sequence of max_model_len must fit, evenly sharded. On CPU, where memory is
    other people's too, conversations are kept in `CPU_CACHE_BYTES` of a host beyond that.

    Raises:
        PlacementError: They do not.
    """
    num_ranks = len(infos)
    page_bytes = infos[0].kv_bytes_per_token * config.page_tokens
    pages_that_fit = min(info.kv_memory_bytes for info in infos) // page_bytes
    wanted_len = config.max_model_len or max_position_embeddings
    # A zigzag share is at most two tokens over even, decode at most one block.
    slack = config.decode_block_tokens + 2
    wanted_pages = -(-(-(-wanted_len // num_ranks) + slack) // config.page_tokens)
    fitting_len = (pages_that_fit * config.page_tokens - slack) * num_ranks
    if fitting_len < (config.max_model_len or 2):
        raise PlacementError(
            f"max_model_len {wanted_len} needs {wanted_pages * page_bytes / 2**30:.3g} GiB of"
            f" KV pages on each of {num_ranks} ranks, but"
            f" {pages_that_fit * page_bytes / 2**30:.3g} GiB are free: lower max_model_len (at"
            f" most {max(0, fitting_len)} fit) or use more ranks"
        )
    num_pages = pages_that_fit
    if infos[0].device == "cpu" and config.kv_cache_memory_bytes is None:
        hosts = [where.host for where in places]
        per_rank_bytes = CPU_CACHE_BYTES // max(map(hosts.count, hosts))
        num_pages = min(pages_that_fit, max(wanted_pages, per_rank_bytes // page_bytes))
    return ClusterInfo(
        model=config.model,
        num_ranks=num_ranks,
        hosts=tuple(where.host for where in places),
        workers=tuple(infos),
        max_model_len=min(wanted_len, fitting_len),
        kv_capacity_tokens=num_pages * config.page_tokens * num_ranks,
        has_tokenizer=has_tokenizer,
    )
