"""A file that is not what its name says is never used, and an Arrow type never runs code."""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import xxhash

from actors.kv.disk import DiskTier
from actors.kv.disk_file import _SCHEMA, FileName, read_file
from actors.kv.pieces import BadPiece, PieceId
from tests.kv_records import LAYOUT, make_record, piece_id

PIECES = 4
RECORD = bytes(make_record(piece_id(1)))
Fault = Callable[[Path, Path, random.Random], None]  # does harm to a file; another one is there


def flip_bits(path: Path, other: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 100])):
        # Arrow's own parts are small: half of the faults shall meet them.
        edge = rng.choice([min(700, len(data)), len(data)])
        bit = rng.choice([1, -1]) * rng.randrange(1, 8 * edge)
        data[bit // 8] ^= 1 << bit % 8
    if data == path.read_bytes():  # bits flipped back
        data[0] ^= 1
    path.write_bytes(data)


def cut_off(path: Path, other: Path, rng: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(rng.randrange(path.stat().st_size))


def lengthen(path: Path, other: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 64, 5000])))


def empty(path: Path, other: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def overwrite(path: Path, other: Path, rng: random.Random) -> None:
    """What a crash may leave of a file that was not synced: zeros in its place."""
    start = rng.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(rng.randrange(1, path.stat().st_size - start + 1)))
        # A run of zeros over zeros is no harm.
        file.seek(0)
        file.write(b"\0")


def swap(path: Path, other: Path, rng: random.Random) -> None:
    between = path.with_name("between")
    path.rename(between)
    other.rename(path)
    between.rename(other)


def rename(path: Path, other: Path, rng: random.Random) -> None:
    """The name of one piece, and the bytes and checksum of another."""
    name, theirs = FileName.parse(path.name), FileName.parse(other.name)
    assert name is not None
    assert theirs is not None
    path.unlink()
    shutil.copy(other, path.with_name(str(dataclasses.replace(theirs, piece=name.piece))))


def misplace(path: Path, other: Path, rng: random.Random) -> None:
    """A whole file whose name says that the record begins elsewhere."""
    name = FileName.parse(path.name)
    assert name is not None
    offset = name.offset_bytes + rng.choice([-8, -1, 1, 8])
    path.rename(path.with_name(str(dataclasses.replace(name, offset_bytes=offset))))


FAULTS: list[Fault] = [flip_bits, cut_off, lengthen, empty, overwrite, swap, rename, misplace]


def do_harm(directory: Path, fault: Fault, rng: random.Random) -> None:
    """Harm one file of a tier; whatever is read from it then is right, or refused and removed."""
    shutil.rmtree(directory, ignore_errors=True)
    tier = open_tier(directory)
    records = {
        piece: make_record(piece, rng.choice([100, 3000]), seed=number)
        for number, piece in ((number, piece_id(number)) for number in range(PIECES))
    }
    for piece, record in records.items():
        tier.write(piece, b"t", record)
    harmed, other = rng.sample(sorted(tier.directory.rglob("*.arrow")), 2)
    fault(harmed, other, rng)
    # A new name is met where a tier opens; else its file has only vanished.
    if fault in (rename, misplace) or rng.random() < 0.5:
        tier = open_tier(directory)
    refused = sum(not _reads(tier, piece, record) for piece, record in records.items())
    assert 1 <= refused <= 2
    assert open_tier(directory).verify()["bad"] == 0  # what was bad has been removed


def _reads(tier: DiskTier, piece: PieceId, record: memoryview) -> bool:
    """Return whether a tier gives a record; what it gives must be right."""
    try:
        target = memoryview(bytearray(tier.size(piece)))
        tier.read_into(piece, target)
    except (BadPiece, KeyError):
        return False
    assert target == record
    return True


def open_tier(directory: Path) -> DiskTier:
    tier = DiskTier(directory, 2**30, LAYOUT)
    tier.open()
    return tier


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught_before_use(tmp_path: Path, fault: Fault) -> None:
    """Some of each kind every day."""
    for seed in range(30):
        do_harm(tmp_path / "tier", fault, random.Random(f"{fault.__name__} {seed}"))


@pytest.mark.campaign
@pytest.mark.parametrize("fault", FAULTS)
def test_ten_thousand_faults_are_caught_before_use(tmp_path: Path, fault: Fault) -> None:
    for seed in range(1250):
        do_harm(tmp_path / "tier", fault, random.Random(f"campaign {fault.__name__} {seed}"))


def test_verify_removes_what_is_bad_and_counts_it(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    for number in range(5):
        tier.write(piece_id(number), b"t", make_record(piece_id(number)))
    flip_bits(Path(tier._files[piece_id(3)].path), Path(), random.Random(0))
    assert tier.verify() == {"verified": 4, "bad": 1, "vanished": 0}
    assert tier.find(piece_id(3).key) == []
    assert tier.stats()["bad"] == 1
    assert len(list(tier.directory.rglob("*.arrow"))) == 4


def test_verify_looks_into_records_too(tmp_path: Path) -> None:
    """A record that was damaged before it was written is in a file that is whole."""
    tier = open_tier(tmp_path)
    record = make_record(piece_id(1))
    record[-1] ^= 1
    tier.write(piece_id(1), b"t", record)
    assert tier.verify()["bad"] == 1


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    """Clusters with other models share a directory; files moved between them are no help."""
    other = dataclasses.replace(LAYOUT, head_dim=16)
    theirs = DiskTier(tmp_path, 2**30, other)
    theirs.open()
    theirs.write(piece_id(1), b"t", make_record(piece_id(1), layout=other))
    ours = open_tier(tmp_path)
    assert ours.find(piece_id(1).key) == []
    ours.directory.rmdir()
    theirs.directory.rename(ours.directory)
    ours.open()
    target = memoryview(bytearray(ours.size(piece_id(1))))
    with pytest.raises(BadPiece, match="another piece or layout"):
        ours.read_into(piece_id(1), target)
    assert list(ours.directory.rglob("*.arrow")) == []


class _RunsCode(pa.ExtensionType):
    """A type whose mere reading does something."""

    ran = False

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), "ringspan.test.runs_code")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, data: bytes) -> "_RunsCode":
        cls.ran = True
        return cls()


def forge(directory: Path, column: pa.Array, field: pa.Field) -> FileName:
    """Write an Arrow file that is not ours under a name whose checksum is right."""
    schema = pa.schema([field], metadata=_SCHEMA.metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([column], schema=schema))
    data = sink.getvalue().to_pybytes()
    offset = max(data.find(RECORD), 8)
    name = FileName("0" * 16, piece_id(1), len(RECORD), offset, xxhash.xxh3_128_hexdigest(data))
    (directory / str(name)).write_bytes(data)
    return name


def test_an_extension_type_is_refused_before_it_runs(tmp_path: Path) -> None:
    """Even where it is registered, and the file's checksum is right."""
    kind = _RunsCode()
    pa.register_extension_type(kind)
    try:
        storage = pa.array([RECORD], pa.large_binary())
        column = pa.ExtensionArray.from_storage(kind, storage)
        name = forge(tmp_path, column, pa.field("record", kind, nullable=False))
        _RunsCode.ran = False
        with pytest.raises(BadPiece, match="extension type"):
            read_file(str(tmp_path / str(name)), name, memoryview(bytearray(name.size_bytes)))
        assert not _RunsCode.ran
    finally:
        pa.unregister_extension_type(kind.extension_name)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ([RECORD], pa.field("other", pa.large_binary(), nullable=False)),
        ([RECORD], pa.field("record", pa.binary(), nullable=False)),
        ([RECORD, b""], pa.field("record", pa.large_binary(), nullable=False)),
        ([b"", RECORD], pa.field("record", pa.large_binary(), nullable=False)),
        ([RECORD[1:]], pa.field("record", pa.large_binary(), nullable=False)),
        ([RECORD + b"x"], pa.field("record", pa.large_binary(), nullable=False)),
    ],
    ids=["name", "type", "two rows", "row before", "shorter", "longer"],
)
def test_another_arrow_file_is_refused(
    tmp_path: Path, values: list[bytes], field: pa.Field
) -> None:
    """Its checksum is right, but it is no file that we write."""
    name = forge(tmp_path, pa.array(values, field.type), field)
    with pytest.raises(BadPiece):
        read_file(str(tmp_path / str(name)), name, memoryview(bytearray(name.size_bytes)))


def test_the_forged_files_are_refused_for_what_was_forged(tmp_path: Path) -> None:
    """What the tests above write is read, where nothing is forged."""
    field = pa.field("record", pa.large_binary(), nullable=False)
    name = forge(tmp_path, pa.array([RECORD], pa.large_binary()), field)
    target = memoryview(bytearray(name.size_bytes))
    read_file(str(tmp_path / str(name)), name, target)
    assert target == RECORD


def test_files_are_plain_arrow(tmp_path: Path) -> None:
    """Anybody may read the record with Arrow alone, mapped."""
    tier = open_tier(tmp_path)
    tier.write(piece_id(1), b"t", make_record(piece_id(1)))
    [path] = tier.directory.rglob("*.arrow")
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        assert table.column("record")[0].as_py() == RECORD
        assert table.schema.metadata[b"ringspan.kv"] == b"1"


def test_a_record_is_aligned_in_its_file(tmp_path: Path) -> None:
    """Else reading it takes a third longer."""
    tier = open_tier(tmp_path)
    tier.write(piece_id(1), b"t", make_record(piece_id(1)))
    assert tier._files[piece_id(1)].name.offset_bytes % 64 == 0


def test_names_say_everything() -> None:
    name = FileName("0123456789abcdef", piece_id(1, 3, 9, "int8"), 5000, 368, "f" * 32)
    assert FileName.parse(str(name)) == name
    assert len(str(name)) < 255
    for strange in ("", "notes.txt", f"{name}.tmp", str(name).replace("int8", "Int8")):
        assert FileName.parse(strange) is None
