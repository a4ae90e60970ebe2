"""Which cores a rank and its link have, so that one core is the device and no other helps it."""

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch

from actors.kv.link import Link, ThrottledLink


@contextlib.contextmanager
def on_cores(links: Sequence[Link], device: torch.device) -> Iterator[str]:
    """On CPU let the rank compute on one core, and links have the others; yield how it is.

    Threads that begin meanwhile, as loaders do, are on the rank's core: it is the device.
    """
    cores = os.sched_getaffinity(0)
    if device.type != "cpu" or len(cores) < 2:
        yield "the machine's cores are shared by all" if device.type == "cpu" else str(device)
        return
    own = min(cores)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {own})
    for link in links:
        if isinstance(link, ThrottledLink):
            os.sched_setaffinity(link.pid, cores - {own})
    try:
        yield "one core computes, projects and copies, the link has another"
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
