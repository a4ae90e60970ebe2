"""The command line: ``ringspan COMMAND ...`` or ``python -m cluster COMMAND ...``."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from cluster.doctor import command as doctor
from models.errors import RingspanError

try:
    from configs import ConfigError
except ImportError:  # `ringspan doctor` tells what is missing
    ConfigError = RingspanError  # type: ignore[misc, assignment]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage of all commands."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with status 2."""
        self.exit(2, f"ringspan: {message}; see {self.prog} --help\n")


def _add_commands(commands: Any) -> None:
    from cluster import bench, chat, check, demo, generate, kv, serve, trace

    generate.add_command(commands)
    serve.add_command(commands)
    chat.add_command(commands)
    trace.add_command(commands)
    kv.add_command(commands)
    check.add_command(commands)
    bench.add_command(commands)
    demo.add_demo_command(commands)
    demo.add_needle_command(commands)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    # gRPC's own log of what an error says better; read when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    parser = Parser(prog="ringspan", description="Exact inference over contexts sharded on a ring.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] != ["doctor"]:  # which is to work where the others cannot even be imported
        _add_commands(commands)
    doctor.add_command(commands)
    options, rest = parser.parse_known_args(words)
    # `key=value` may stand anywhere; argparse alone takes them in one place only.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.error(f"unknown argument {(unknown or rest)[0]}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    stopped_by = [signal.SIGINT]

    def stop(number: int, frame: FrameType | None) -> None:
        """End on SIGTERM as on Ctrl-C; what `ray.get` makes of a SystemExit is status 1."""
        stopped_by[0] = signal.Signals(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except (RingspanError, ConfigError) as error:
        print(f"ringspan: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ringspan: stopped by {stopped_by[0].name}", file=sys.stderr)
        return 128 + stopped_by[0]
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # What is still buffered would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # whoever read it, `head` perhaps, has gone
            return 128 + signal.SIGPIPE
        print(f"ringspan: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
