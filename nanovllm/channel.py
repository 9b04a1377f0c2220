"""How clients connect."""

#: Largest message in either direction.
MAX_MESSAGE_BYTES = 32 * 1024 * 1024
#: Limit of calls that do not generate, unless the caller gives one.
UNARY_TIMEOUT_S = 60.0

LOOPBACK_PREFIXES = ("localhost:", "127.", "[::1]:", "unix:")


def check_address(address: str) -> str:
    """Returns the address if it is HOST:PORT or unix:/path.

    Raises:
        ValueError: It is something else.
    """
    host, colon, port = address.rpartition(":")
    is_unix = address.startswith("unix:") and len(address) > len("unix:")
    if is_unix or (colon and host and "/" not in address and port.isdecimal()):
        return address
    raise ValueError(f"{address!r} is no address; give HOST:PORT (no scheme) or unix:/path")


def channel_options(address: str) -> list[tuple[str, int]]:
    """Returns the gRPC channel options for an address."""
    options = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A server that comes back is found within two seconds, not after gRPC's two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if address.startswith(LOOPBACK_PREFIXES):
        # gRPC would send even loopback traffic through $http_proxy.
        options.append(("grpc.enable_http_proxy", 0))
    return options
