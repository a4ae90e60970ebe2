"""Limits, memory, ports, files and interfaces of this machine."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import socket
import stat
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cluster.doctor.finding import Finding, gib, ok, problem, warning

SHARED_MEMORY = Path("/dev/shm")
LEAST_FILES = 4096  # open at a time; Ray holds hundreds for each worker of a host
SIOCGIFADDR = 0x8915
LISTEN = "0A"  # state of a socket in /proc/net/tcp


def check_shared_memory(store_bytes: int, ray_bytes: int) -> Finding:
    """Whether the KV store's arena and Ray's object store fit."""
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        sentence = f"{SHARED_MEMORY} cannot be used: {error.strerror}"
        return problem("shared memory", sentence, f"mount a tmpfs at {SHARED_MEMORY}")
    size_bytes, free_bytes = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    return judge_shared_memory(size_bytes, free_bytes, store_bytes, ray_bytes)


def judge_shared_memory(
    size_bytes: int, free_bytes: int, store_bytes: int, ray_bytes: int
) -> Finding:
    """Compare what is free with what will be taken."""
    told = f"{gib(free_bytes)} of {gib(size_bytes)} free"
    needed = f"{gib(store_bytes)} for the KV store and {gib(ray_bytes)} for Ray's object store"
    if store_bytes + ray_bytes > free_bytes:
        return problem(
            "shared memory",
            f"{told} in {SHARED_MEMORY}, but {needed} are needed",
            f"lower kv_store.host_memory_bytes, make {SHARED_MEMORY} larger (of a container:"
            " --shm-size; of a pod: a memory emptyDir), or remove what others left there",
        )
    return ok("shared memory", f"{told}, for {needed}")


def check_limits(pinned_bytes: int) -> list[Finding]:
    """Open files, and memory that may be locked where GPUs read it."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    return judge_limits(
        None if files == unlimited else files,
        None if locked == unlimited else locked,
        pinned_bytes,
    )


def judge_limits(files: int | None, locked_bytes: int | None, pinned_bytes: int) -> list[Finding]:
    """Compare limits (None: there is none) with what is needed; no GPUs pin 0 bytes."""
    if files is not None and files < LEAST_FILES:
        sentence = f"a process may open {files} files at most, and Ray needs more for many ranks"
        found = [warning("open files", sentence, "raise the hard limit: ulimit -Hn 65536")]
    else:
        found = [ok("open files", "no limit" if files is None else f"up to {files} a process")]
    if locked_bytes is not None and locked_bytes < pinned_bytes:
        found.append(
            warning(
                "locked memory",
                f"{gib(locked_bytes)} may be locked, but the KV store pins {gib(pinned_bytes)}",
                "ulimit -l unlimited; of a container: --ulimit memlock=-1 or the capability"
                " IPC_LOCK",
            )
        )
    return found


def check_port(host: str, port: int, flag: str) -> Finding:
    """Whether a server could listen there, and who does if not."""
    name = f"port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            sentence = f"{host} port {port} is in use by {port_owner(port) or 'another user'}"
            return warning(name, sentence, f"end it, or serve with another {flag}")
        sentence = f"nothing can listen at {host} port {port}: {error.strerror or error}"
        return problem(name, sentence, f"give another --host or {flag}")
    return ok(name, f"free at {host}")


def port_owner(port: int) -> str | None:
    """Return the process that listens on a port, or None where it cannot be seen."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for handle in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(handle.readlink()) in inodes:
                        words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                        return f"process {process.name} ({words.strip()[:80]})"
    return None


def check_disk(directory: Path, disk_bytes: int) -> list[Finding]:
    """Whether a KV store could keep its files there."""
    name = "disk"
    try:
        # Nothing is made that a start would make.
        there = next(each for each in (directory, *directory.absolute().parents) if each.exists())
        with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor") as file:
            file.write(bytes(4096))
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_direct = _opens_direct(file.name)
        room = os.statvfs(there)
    except OSError as error:
        sentence = f"{directory} cannot be written and locked: {error.strerror}"
        return [problem(name, sentence, "set kv_store.disk_directory to a local disk of this user")]
    found = [judge_room(directory, room.f_bavail * room.f_frsize, disk_bytes)]
    if not is_direct:
        sentence = f"{directory} takes no O_DIRECT: what is read fills the page cache"
        found.append(warning(name, sentence, "use a local file system such as ext4 or xfs"))
    return found


def judge_room(directory: Path, free_bytes: int, disk_bytes: int) -> Finding:
    """Compare what is free on a disk with what the store may take."""
    if free_bytes < disk_bytes:
        sentence = f"{directory} has {gib(free_bytes)} free, but may take {gib(disk_bytes)}"
        return warning("disk", sentence, "lower kv_store.disk_bytes, or make room")
    return ok("disk", f"{directory} can be written, {gib(free_bytes)} free")


def _opens_direct(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def check_secret(path: Path, *, is_needed: bool, what: str = "secret") -> Finding:
    """Whether a secret file is this user's alone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        if is_needed:
            return problem(what, f"{path} is not there", "write it, with mode 0600")
        return ok(what, f"{path} is not there yet: the first start with a KV store makes it")
    except OSError as error:
        return problem(what, f"{path} cannot be read: {error.strerror}", "give its user access")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        sentence = f"{path} has mode {mode:04o}, by which others can reach it"
        return problem(what, sentence, f"chmod 600 {path}")
    if status.st_uid != os.getuid():
        return problem(what, f"{path} is another user's", "run as that user, or make it anew")
    return ok(what, f"{path} is this user's alone")


def addresses() -> dict[str, str]:
    """Return the IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def check_interfaces(environment: Mapping[str, str], *, is_joined: bool) -> list[Finding]:
    """Which interface gloo and NCCL will choose, for ranks here or on the hosts of a cluster."""
    try:
        resolved = socket.gethostbyname(socket.gethostname())
    except OSError:
        resolved = None
    mtus = {}
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError, ValueError):
            mtus[name] = int(Path(f"/sys/class/net/{name}/mtu").read_text())
    return judge_interfaces(addresses(), mtus, resolved, environment, is_joined=is_joined)


def judge_interfaces(
    by_name: Mapping[str, str],
    mtus: Mapping[str, int],
    resolved: str | None,
    environment: Mapping[str, str],
    *,
    is_joined: bool,
) -> list[Finding]:
    """Say where the ranks will listen.

    Args:
        by_name: Address of each interface.
        mtus: Bytes of its packets.
        resolved: What this host's name comes to.
        environment: With GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where they are set.
        is_joined: Whether the ranks may be on several hosts.
    """
    found = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for name in _names(environment.get(variable, "")):
            if not any(each.startswith(name) for each in mtus):
                sentence = f"{variable} names {name}, which is none of {', '.join(mtus)}"
                found.append(problem("network", sentence, f"set {variable} right, or unset it"))
    chosen = _names(environment.get("GLOO_SOCKET_IFNAME", ""))[:1]
    chosen = chosen or [name for name, address in by_name.items() if address == resolved]
    others = [name for name, address in by_name.items() if not address.startswith("127.")]
    if found:
        return found
    if not chosen:
        sentence = f"this host's name comes to {resolved or 'no address'}, of no interface here"
        advice = "mend /etc/hosts, or set GLOO_SOCKET_IFNAME to one of " + ", ".join(by_name)
        return [warning("network", sentence, advice)]
    told = f"gloo listens at {by_name.get(chosen[0])} ({chosen[0]}, MTU {mtus.get(chosen[0])})"
    if is_joined and by_name.get(chosen[0], "").startswith("127."):
        advice = f"for ranks on several hosts set GLOO_SOCKET_IFNAME to one of {', '.join(others)}"
        return [warning("network", f"{told}, which no other host reaches", advice)]
    return [ok("network", told)]


def _names(value: str) -> list[str]:
    """Return names of interfaces; NCCL's may begin with ``=``, and ``^`` excludes."""
    return [name.lstrip("=") for name in value.split(",") if name and not name.startswith("^")]


def check_profiles(directory: Path, torch_version: str | None) -> Finding:
    """What measured rates there are, and which are of another torch."""
    paths = sorted(directory.glob("profile-*.json"))
    stale = []
    for path in paths:
        try:
            facts = json.loads(path.read_bytes())["facts"]
            is_stale = torch_version is not None and facts["torch"] != torch_version
        except (OSError, ValueError, KeyError, TypeError):
            is_stale = True
        if is_stale:
            stale.append(path)
    return judge_profiles(len(paths), len(stale), directory)


def judge_profiles(count: int, stale: int, directory: Path) -> Finding:
    """Say what measured rates there are."""
    there = next(each for each in (directory, *directory.parents) if each.exists())
    if not os.access(there, os.W_OK):
        sentence = f"measured rates cannot be kept in {directory}: every start measures anew"
        return warning("rates", sentence, "set profile.directory to a directory of this user")
    told = f"{count} files of measured rates in {directory}"
    if stale:
        told += f"; {stale} are damaged or of another torch: these are not used"
    return ok("rates", told)
