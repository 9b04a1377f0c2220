"""The proxy that stands for the network."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from benchmarks.chaos.proxy import Proxy

LIMIT_S = 20.0


def converse(
    scenario: Callable[[Proxy, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> None:
    """Runs a scenario with a connection through a proxy to a server that echoes."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        proxy = Proxy()
        await proxy.start()
        proxy.upstream = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        host, _, port = proxy.address.rpartition(":")
        async with asyncio.timeout(LIMIT_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            await scenario(proxy, reader, writer)
            writer.close()
            await proxy.close()
        server.close()

    asyncio.run(main())


def test_bytes_pass_in_both_directions():
    async def scenario(proxy, reader, writer) -> None:
        writer.write(b"abc")
        assert await reader.readexactly(3) == b"abc"

    converse(scenario)


def test_what_is_sent_while_the_proxy_is_cut_arrives_when_it_heals():
    async def scenario(proxy, reader, writer) -> None:
        writer.write(b"abc")
        await reader.readexactly(3)
        proxy.cut()
        writer.write(b"def")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.readexactly(1)
        proxy.heal()
        assert await reader.readexactly(3) == b"def"

    converse(scenario)


def test_a_reset_breaks_the_connection():
    async def scenario(proxy, reader, writer) -> None:
        writer.write(b"abc")
        await reader.readexactly(3)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)

    converse(scenario)


def test_without_a_server_connections_end_at_once():
    async def scenario(proxy, reader, writer) -> None:
        proxy.upstream = None
        host, _, port = proxy.address.rpartition(":")
        lost_reader, lost_writer = await asyncio.open_connection(host, int(port))
        assert await lost_reader.read() == b""
        lost_writer.close()

    converse(scenario)
