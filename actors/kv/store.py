"""The KV store of one host: its arena, its disk, and what it sends to other hosts.

One process per host runs this class. KV never passes through it but where it goes to or
comes from disk or another host: ranks map the arena, and ask here only for places in it.
"""

import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from actors.kv.arena import Arena, sweep
from actors.kv.directory import Directory
from actors.kv.disk import DiskTier
from actors.kv.disk_writer import DiskWriter, Recode
from actors.kv.flight import PROBE_BYTES, PieceClient, PieceServer, probe_bytes
from actors.kv.host_tier import HostTier
from actors.kv.messages import Found, Lease, StoreInfo, StoreSpec, Wanted
from actors.kv.pieces import LOSSLESS, RAW, BadPiece, PieceId, checksum
from actors.kv.stager import Stager

EXPIRE_EVERY_S = 5.0  # or a quarter of the time that leases have


class KVStore:
    """The store of one host. It knows nothing of Ray; any number of threads may call it."""

    def __init__(self, spec: StoreSpec, flight_host: str = "127.0.0.1") -> None:
        """``flight_host`` is the address of this machine that other hosts reach it by."""
        self._spec = spec
        self._flight_host = flight_host
        self._closing = threading.Event()

    def start(self) -> StoreInfo:
        """Sweep what dead stores left, make the arena, open the disk, serve other hosts.

        Raises:
            OSError: Shared memory has no room for the arena, the disk cannot be opened, or a
                certificate cannot be used.
        """
        spec = self._spec
        sweep()
        self._arena = Arena.create(spec.cluster, spec.host, spec.capacity_bytes)
        try:
            directory = Directory(
                spec.capacity_bytes,
                int(spec.capacity_bytes * spec.tenant_share),
                spec.lease_s,
                # Ids that an earlier store of this host gave must mean nothing here.
                first_lease_id=secrets.randbits(31) << 32,
            )
            self._host = HostTier(self._arena, directory, spec.layout)
            self._disk = self._open_disk()
            self._server = PieceServer(self._flight_host, spec.token, self._open_piece, spec.tls)
            self._server.start()
        except BaseException:
            self._arena.close()
            raise
        self._writer = None
        if self._disk:
            recode = None if spec.disk_dtype == RAW else self._recoding(spec.disk_dtype)
            self._writer = DiskWriter(self._host, self._disk, recode=recode)
            self._writer.start()
        self._client = PieceClient(spec.token, tls=spec.tls)
        self._stager = Stager(self._host, self._disk, self._client, spec.layout, spec.lease_s)
        self._timer = threading.Thread(target=self._expire, name="kv-expire", daemon=True)
        self._timer.start()
        return StoreInfo(
            host=spec.host,
            pid=os.getpid(),
            arena_path=str(self._arena.path),
            capacity_bytes=spec.capacity_bytes,
            flight_address=self._server.address,
        )

    def ping(self) -> None:
        """Answer, as long as this process can."""

    def reserve(
        self, tenant: bytes, owner: str, wanted: Sequence[tuple[PieceId, int]]
    ) -> list[Lease | None]:
        """Lease places for pieces of these bytes, to write them into the arena.

        None for a piece that is there or being written, also where its tokens are there as
        activations instead of KV or the other way round, and where no room can be made.
        """
        return self._host.reserve(tenant, owner, wanted, expires=True, any_lossless=True)

    def commit(self, done: Sequence[tuple[int, bytes]]) -> None:
        """End leases to write: the records are whole, each with its header's checksum as seal.

        They go to disk behind this call. Leases that have expired are passed over.
        """
        committed = self._host.commit(done)
        if self._writer:
            self._writer.put(committed)

    def abort(self, lease_ids: Sequence[int]) -> None:
        """End leases to write; what was written is forgotten."""
        self._host.abort(lease_ids)

    def find(self, keys: Sequence[bytes]) -> list[Found]:
        """Return the pieces of these blocks, each once: in the arena, else on disk."""
        found = self._host.find(keys)
        if self._disk:
            in_arena = {each.piece for each in found}
            for key in keys:
                for piece, size_bytes in self._disk.find(key):
                    if piece not in in_arena:
                        found.append(Found(piece=piece, tier="disk", size_bytes=size_bytes))
        return found

    def stage(self, wanted: Sequence[Wanted], tenant: bytes, owner: str) -> list[Lease | None]:
        """Lease pieces to read, bringing them into the arena from the nearest tier that has them.

        None for a piece that is missing, damaged or does not fit: compute it. What comes
        from disk or another host is verified; what was in the arena its reader verifies.
        """
        return self._stager.stage(wanted, tenant, owner)

    def release(self, lease_ids: Sequence[int]) -> list[int]:
        """End leases; return those that had ended before.

        What was read under those may have been overwritten while it was read.
        """
        return self._host.release(lease_ids)

    def end_owner(self, owner: str) -> int:
        """End all leases of an owner that is gone; return how many."""
        return self._host.end_owner(owner)

    def drop(self, pieces: Sequence[PieceId]) -> None:
        """Forget pieces that a reader found to be bad, in the arena and on disk."""
        self._host.drop(pieces)
        if self._disk:
            for piece in pieces:
                self._disk.drop(piece)

    def stats(self) -> dict[str, dict[str, int]]:
        """Return counters and sizes of each tier: ``host`` (with our pid), ``disk``, ``remote``."""
        sources = self._stager.stats()
        disk = dict(sources["disk"])
        if self._disk and self._writer:
            disk |= {**self._writer.stats(), **self._disk.stats()}
        host = {"pid": os.getpid(), **self._host.stats()}
        return {"host": host, "disk": disk, "remote": sources["remote"]}

    def verify(self) -> dict[str, dict[str, int]]:
        """Verify every record of arena and disk, drop the bad ones, and return the counts."""
        counts = {"host": self._host.verify()}
        if self._disk:
            counts["disk"] = self._disk.verify()
        return counts

    def measure_disk(self, num_bytes: int) -> tuple[float, float] | None:
        """Return the seconds to read and to write so many bytes on this store's disk.

        As pieces are read and written there, with their checksums; see `DiskTier.measure`, also
        for what it raises. None: this store has no disk.
        """
        return self._disk.measure(num_bytes) if self._disk else None

    def probe_remote(self, address: str, num_bytes: int) -> float:
        """Return the seconds that so many bytes take from another host's store, verified.

        The same way as pieces that are staged; the first call connects, which takes longer.

        Raises:
            ValueError: ``num_bytes`` is not between 1 and `actors.kv.flight.PROBE_BYTES`.
            ConnectionError: That host cannot be reached, refuses, or sent other bytes.
        """
        if not 0 < num_bytes <= PROBE_BYTES:
            raise ValueError(f"a probe has 1 to {PROBE_BYTES} bytes, got {num_bytes}")
        target = memoryview(bytearray(b"\1") * num_bytes)  # written once, as arenas mostly are
        start_s = time.perf_counter()
        self._client.probe(address, target)
        found = checksum(target)
        elapsed_s = time.perf_counter() - start_s
        if found != checksum(probe_bytes(num_bytes)):
            raise ConnectionError(f"the probe of {num_bytes} bytes from {address} is damaged")
        return elapsed_s

    def clear(self, tenant: bytes | None = None) -> dict[str, dict[str, int]]:
        """Forget what a tenant has here (None: all); return how many pieces of which tier."""
        # The arena first: a piece that is being written to disk is then found gone.
        counts = {"host": {"cleared": self._host.clear(tenant)}}
        if self._disk:
            counts["disk"] = {"cleared": self._disk.clear(tenant)}
        return counts

    def close(self) -> None:
        """Finish what is on its way to disk, for a limited time, and remove the arena."""
        self._closing.set()
        self._server.close()
        self._stager.close()
        self._client.close()
        if self._writer:
            self._writer.close()
        self._timer.join()
        self._arena.close()

    def _open_disk(self) -> DiskTier | None:
        spec = self._spec
        if spec.disk_directory is None:
            return None
        disk = DiskTier(Path(spec.disk_directory), spec.disk_bytes, spec.layout)
        disk.open()
        return disk

    @contextmanager
    def _open_piece(self, piece: PieceId) -> Iterator[memoryview]:
        """Give a record to send to another host, which verifies it; KeyError: not here."""
        with ExitStack() as stack:
            try:
                record = self._open(piece, stack)
            except KeyError:
                if piece.encoding in LOSSLESS or piece.encoding != self._spec.remote_dtype:
                    raise
                # Others ask for what a lossy `remote_dtype` makes of what is here.
                raw = dataclasses.replace(piece, encoding=RAW)
                recode = self._recoding(self._spec.remote_dtype)
                record = recode(raw, self._open(raw, stack))[1]
            yield record

    def _open(self, piece: PieceId, stack: ExitStack) -> memoryview:
        try:
            reading = self._host.reading(piece, "flight", counts_as_use=True)
            return stack.enter_context(reading)
        except (KeyError, BadPiece):
            return self._read_from_disk(piece)

    def _recoding(self, encoding: str) -> Recode:
        """Return what puts records of raw KV into a lossy encoding; others stay as they are."""
        from actors.kv.recode import recode  # imports torch, which no other store needs

        def recoded(piece: PieceId, record: memoryview) -> tuple[PieceId, memoryview]:
            if piece.encoding != RAW:
                return piece, record
            other, written = recode(record, piece, self._spec.layout, encoding)
            return other, memoryview(written)

        return recoded

    def _read_from_disk(self, piece: PieceId) -> memoryview:
        if self._disk is None:
            raise KeyError(piece)
        try:
            record = memoryview(bytearray(self._disk.size(piece)))
            self._disk.read_into(piece, record)
        except (BadPiece, OSError) as error:
            raise KeyError(piece) from error
        return record

    def _expire(self) -> None:
        every_s = min(EXPIRE_EVERY_S, self._spec.lease_s / 4)
        while not self._closing.wait(every_s):
            self._host.expire()
