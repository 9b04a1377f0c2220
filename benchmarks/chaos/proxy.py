"""A TCP proxy that can be cut and healed, between a client and a server that moves."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator

_CHUNK_BYTES = 64 * 1024
# Linger time 0: the kernel answers with a reset instead of an orderly end.
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards connections on a loopback port of its own to wherever the server listens now."""

    def __init__(self) -> None:
        #: HOST:PORT of the server; None: connections are refused.
        self.upstream: str | None = None
        self._server: asyncio.Server | None = None
        self._address = ""
        self._passing = asyncio.Event()
        self._passing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        """HOST:PORT that clients connect to."""
        return self._address

    async def start(self) -> None:
        """Listens on a free port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Ends everything."""
        if self._server is not None:
            self._server.close()
        self.reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Lets nothing through in either direction; nobody is told."""
        self._passing.clear()

    def heal(self) -> None:
        """Delivers what was held back, late, and goes on."""
        self._passing.set()

    def reset(self) -> None:
        """Breaks every connection."""
        for writer in list(self._writers):
            connection = writer.get_extra_info("socket")
            if connection is not None:
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError), self._owned(writer):
            await self._passing.wait()
            if self.upstream is None:
                return
            host, _, port = self.upstream.rpartition(":")
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
            with self._owned(up_writer):
                pumps = [
                    asyncio.create_task(self._pump(reader, up_writer)),
                    asyncio.create_task(self._pump(up_reader, writer)),
                ]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await self._passing.wait()
            writer.write(data)
            await writer.drain()
        await self._passing.wait()

    @contextlib.contextmanager
    def _owned(self, writer: asyncio.StreamWriter) -> Iterator[None]:
        self._writers.add(writer)
        try:
            yield
        finally:
            self._writers.discard(writer)
            writer.close()
