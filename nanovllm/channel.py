"""How channels to the services are set up."""

import ipaddress

#: Largest message of the public API in either direction.
MAX_MESSAGE_BYTES = 32 * 1024 * 1024
#: Limit of calls that do not generate, unless the caller gives one.
UNARY_TIMEOUT_S = 60.0

ChannelOptions = list[tuple[str, int | str]]

# gRPC would send even loopback traffic through $http_proxy.
_NO_PROXY: ChannelOptions = [("grpc.enable_http_proxy", 0)]

#: Notice within 15 seconds a peer that vanished without closing its connection.
KEEPALIVE_OPTIONS: ChannelOptions = [
    ("grpc.keepalive_time_ms", 10_000),
    # For a host that is gone: the kernel gives up on unacknowledged data.
    ("grpc.keepalive_timeout_ms", 5_000),
    # For a process that hangs while its kernel goes on; by default a ping has a minute.
    ("grpc.http2.ping_timeout_ms", 5_000),
]


def message_limits(max_bytes: int) -> ChannelOptions:
    """Returns the options for the largest message in either direction; -1 means no limit."""
    return [
        ("grpc.max_send_message_length", max_bytes),
        ("grpc.max_receive_message_length", max_bytes),
    ]


def _reconnect_within(max_backoff_ms: int) -> ChannelOptions:
    # A server that comes back is found within seconds, not after gRPC's two minutes.
    return [
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", max_backoff_ms),
    ]


#: Options of the scheduler's channel to its executor, which is next door and trusted. A plan may
#: carry max_num_seqs prompts of max_model_len tokens, so messages have no limit of their own.
EXECUTOR_CHANNEL_OPTIONS: ChannelOptions = [
    *message_limits(-1),
    *_reconnect_within(1000),
    *_NO_PROXY,
    *KEEPALIVE_OPTIONS,
]


def check_address(address: str) -> str:
    """Returns the address if it is HOST:PORT or unix:/path.

    Raises:
        ValueError: It is something else.
    """
    host, colon, port = address.rpartition(":")
    is_unix = address.startswith("unix:") and len(address) > len("unix:")
    is_tcp = colon and host and "/" not in address and port.isdecimal() and int(port) <= 65535
    if is_unix or is_tcp:
        return address
    raise ValueError(f"{address!r} is no address; give HOST:PORT (no scheme) or unix:/path")


def is_local(address: str) -> bool:
    """Whether what goes to or from an address stays on this machine: loopback and unix sockets.

    Other names than localhost are not looked up and count as remote.
    """
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def channel_options(address: str) -> ChannelOptions:
    """Returns the gRPC channel options of a client for an address."""
    options = [*message_limits(MAX_MESSAGE_BYTES), *_reconnect_within(2000), *KEEPALIVE_OPTIONS]
    return options + _NO_PROXY if is_local(address) else options
