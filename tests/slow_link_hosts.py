"""Two KV stores in two network namespaces, between them a link with a rate limit.

    unshare --net python -m tests.slow_link_hosts here BYTES_PER_S NUM_PIECES

That process is the one host, and starts the other in a namespace of its own. Nothing of
this has a name outside: namespaces, link and limit are gone once both processes are, and
the other one ends when this one does, in whatever way. What was seen is printed as JSON.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from typing import Any

from actors.kv.arena import Arena
from actors.kv.messages import StoreInfo, StoreSpec, Wanted
from actors.kv.pieces import Record
from actors.kv.store import KVStore
from tests.kv_arena import LAYOUT, fill, made, piece, read

HERE, THERE = "10.99.0.1", "10.99.0.2"
BURST_BYTES = 64 * 2**10  # that the limit lets pass at once
WHERE = Record(num_layers=LAYOUT.num_layers, layer_bytes=2**18)
TENANT = b"tenant"


def limit(device: str, bytes_per_s: float) -> None:
    """Let no more than so many bytes/s out of a device of this namespace."""
    bits_per_s = f"{int(8 * bytes_per_s)}bit"
    tbf = ["tbf", "rate", bits_per_s, "burst", str(BURST_BYTES), "latency", "1s"]
    run("tc", "qdisc", "add", "dev", device, "root", *tbf)


def run(*command: str) -> None:
    """Run a command of the system; its error is this process's."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    subprocess.run(command, check=True, env={**os.environ, "PATH": path}, timeout=30)


def start_store(host: str, address: str, cluster: str) -> tuple[KVStore, StoreInfo]:
    """Give this namespace's end of the link its address, and start the store there."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{address}/24", "dev", host)
    run("ip", "link", "set", host, "up")
    spec = StoreSpec(
        host=host, layout=LAYOUT, capacity_bytes=64 * 2**20, cluster=cluster, token="token"
    )
    store = KVStore(spec, address)
    return store, store.start()


def there(cluster: str, bytes_per_s: float, num_pieces: int) -> None:
    """Be the host that has the pieces, behind the limit; end with stdin."""
    print("in a namespace", flush=True)
    sys.stdin.readline()  # now the device is there
    limit("there", bytes_per_s)
    store, info = start_store("there", THERE, cluster)
    try:
        arena = Arena.attach(info.arena_path)
        wanted = [(piece(number), WHERE.size_bytes) for number in range(num_pieces)]
        for lease in filter(None, store.reserve(TENANT, "rank", wanted)):
            record = arena.view(lease.offset_bytes, lease.size_bytes)
            store.commit([(lease.lease_id, fill(record, lease.piece, where=WHERE))])
        print(info.flight_address, flush=True)
        sys.stdin.read()
    finally:
        store.close()


def here(bytes_per_s: float, num_pieces: int) -> dict[str, Any]:
    """Be the host that wants them; return how many came whole, their bytes and the time."""
    cluster = f"test{uuid.uuid4().hex[:12]}"
    arguments = ["there", cluster, str(bytes_per_s), str(num_pieces)]
    with subprocess.Popen(
        ["unshare", "--net", sys.executable, "-m", "tests.slow_link_hosts", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "in a namespace\n"
        link = ["link", "add", "here", "type", "veth", "peer", "name", "there"]
        run("ip", *link, "netns", str(other.pid))
        print("the link is up", file=other.stdin, flush=True)
        store, info = start_store("here", HERE, cluster)
        try:
            address = other.stdout.readline().strip()
            print(json.dumps({"other_pid": other.pid, "arena": info.arena_path}), flush=True)
            return stage(store, info, address, num_pieces)
        finally:
            store.close()


def stage(store: KVStore, info: StoreInfo, address: str, num_pieces: int) -> dict[str, Any]:
    """Stage all pieces from the other host, and compare them with what was written there."""
    wanted = [
        Wanted(piece=piece(number), size_bytes=WHERE.size_bytes, flight_address=address)
        for number in range(num_pieces)
    ]
    start_s = time.monotonic()
    leases = store.stage(wanted, TENANT, "rank")
    elapsed_s = time.monotonic() - start_s
    arena, num_equal = Arena.attach(info.arena_path), 0
    for lease in filter(None, leases):
        record = arena.view(lease.offset_bytes, lease.size_bytes)
        read(record, lease.piece, lease.seal)
        num_equal += record == made(lease.piece, where=WHERE)
    return {
        "num_equal": num_equal,
        "staged_bytes": store.stats()["remote"]["staged_bytes"],
        "elapsed_s": elapsed_s,
    }


def main() -> None:
    """Be one of the two hosts."""
    if sys.argv[1] == "there":
        there(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
    else:
        print(json.dumps(here(float(sys.argv[2]), int(sys.argv[3]))), flush=True)


if __name__ == "__main__":
    main()
