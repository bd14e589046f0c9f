"""A TCP proxy that is right in the few things that it does, but for one fault that it is told to have:
`python faulty_proxy.py FAULT PORT UPSTREAM_PORT`.
"""

import asyncio
import os
import socket
import struct
import sys

# what each fault needs to remember, or the process would give it back
LEAKED = list[int]()


async def main(fault: str, port: int, upstream: int) -> None:
    if fault == "never listens":
        await asyncio.Event().wait()
    if fault == "does not start":
        sys.exit("faulty: no such luck")

    async def session(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        said = await client.read(1) if fault == "waits for the client" else b""
        server, to_server = await asyncio.open_connection("127.0.0.1", upstream)
        to_server.write(said)
        if fault == "leaks":
            LEAKED.append(os.dup(0))
        if fault == "floods":
            while True:
                to_client.write(bytes(65_536))
                await to_client.drain()
        await asyncio.gather(pump(client, to_server, to_client), pump(server, to_client, to_server))
        for writer in (to_client, to_server):
            writer.close()

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.StreamWriter
    ) -> None:
        passed = 0
        try:
            while data := await reader.read(65_536):
                passed += len(data)
                if fault == "truncates" and passed > 65_000:
                    data = b""
                writer.write(data)
                await writer.drain()
        except ConnectionResetError:
            if fault == "crashes at a reset":
                os.abort()
            for each in (writer, back):
                if fault != "hides resets" and not each.is_closing():
                    sock: socket.socket = each.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.transport.abort()
            return
        if fault == "ends both ways":
            back.close()
        if fault != "swallows half-close":
            writer.write_eof()

    server = await asyncio.start_server(session, "127.0.0.1", port, backlog=512)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
