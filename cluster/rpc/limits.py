"""What one caller may ask of the gRPC server, and the settings of both ends of a connection."""

from dataclasses import dataclass

MiB = 2**20
KEEPALIVE_S = 10.0  # a silent connection is asked so often whether it lives
KEEPALIVE_TIMEOUT_S = 5.0  # and is over where it does not answer
MAX_MESSAGE_BYTES = 4 * MiB  # gRPC's own default
# Of what a server tells: a burst of tokens may come with log-probabilities of a whole vocabulary.
MAX_ANSWER_BYTES = 64 * MiB
MAX_METADATA_BYTES = 16 * 1024

Options = list[tuple[str, int]]


@dataclass(frozen=True, kw_only=True)
class RpcLimits:
    """Checked before memory is taken for what exceeds them."""

    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_prompt_tokens: int = 2**21  # of token ids; what the model takes is checked besides
    max_prompt_bytes: int = 32 * MiB  # of texts, in UTF-8
    max_chat_messages: int = 10_000
    max_streams: int = 256  # Generate calls at once
    max_answers: int = 64  # n
    max_words: int = 1024  # of stop, bad_words and stop_token_ids each
    upload_timeout_s: float = 60.0  # from one piece of a prompt to the next
    grace_s: float = 20.0  # for the streams under way where the server stops

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")


def _common(max_receive_bytes: int, max_send_bytes: int) -> Options:
    return [
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", max_send_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ]


def server_options(limits: RpcLimits) -> Options:
    """Return the settings of a server; a peer that vanishes without a word is noticed."""
    return [
        *_common(limits.max_message_bytes, MAX_ANSWER_BYTES),
        # Clients may ask as often as ours do.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_concurrent_streams", 2 * limits.max_streams),
        ("grpc.so_reuseport", 0),  # else a port in use would be shared in silence
    ]


def client_options() -> Options:
    """Return the settings of a client; it retries by itself, with what it has received."""
    return [*_common(MAX_ANSWER_BYTES, MAX_MESSAGE_BYTES), ("grpc.enable_retries", 0)]
