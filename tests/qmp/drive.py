"""Has a monitor do a whole migration by the client qemu.qmp, and prints as JSON what it said.

    drive.py SOCKET URI SCENARIO
"""

import asyncio
import json
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

# Ten times what a busy machine needs.
LIMIT = 120.0


class Drive:
    def __init__(self, client, listener, uri):
        self.client, self.listener, self.uri = client, listener, uri
        self.states, self.seen = {}, []

    async def execute(self, command, **arguments):
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.client.execute(command, names or None)

    async def prepare(self, capabilities, **parameters):
        switched = [{"capability": name, "state": True} for name in ["events", "return-path", *capabilities]]
        await self.execute("migrate-set-capabilities", capabilities=switched)
        await self.execute("migrate-set-parameters", **parameters)

    async def reach(self, status):
        """Waits for the event of a state, and asks for the figures in it."""
        while True:
            event = await self.listener.get()
            if event["event"] == "MIGRATION":
                self.seen.append(event["data"]["status"])
                if self.seen[-1] == status:
                    break
        await self.ask(status)

    async def ask(self, status):
        while True:
            now = await self.execute("query-migrate")
            if now.get("status") == status:
                self.states[status] = now
                return

    async def moved(self):
        """The migration is under way."""
        await self.reach("active")
        while not self.states["active"]["ram"]["transferred"]:
            await self.ask("active")


async def plain(drive):
    await drive.prepare(["pause-before-switchover"], max_bandwidth=1 << 20)
    await drive.execute("migrate", uri=drive.uri, detach=True)
    await drive.moved()
    await drive.execute("migrate-set-parameters", max_bandwidth=0)
    await drive.reach("pre-switchover")
    await drive.execute("migrate-continue", state="pre-switchover")
    await drive.reach("completed")


async def multifd(drive):
    await drive.prepare(["multifd"], multifd_channels=3, max_bandwidth=0)
    await drive.execute("migrate", uri=drive.uri)
    await drive.reach("completed")


async def cancelled(drive):
    await drive.prepare([], max_bandwidth=1 << 20)
    await drive.execute("migrate", uri=drive.uri)
    await drive.moved()
    await drive.execute("migrate_cancel")
    await drive.reach("cancelled")


async def failed(drive):
    await drive.prepare([])
    try:
        await drive.execute("migrate", uri=drive.uri)
    except ExecuteError:
        # A QEMU may say so at once.
        pass
    await drive.reach("failed")


async def postcopy(drive):
    await drive.prepare(["postcopy-ram"], max_bandwidth=1 << 20, max_postcopy_bandwidth=1 << 20)
    await drive.execute("migrate", uri=drive.uri)
    await drive.moved()
    await drive.execute("migrate-start-postcopy")
    await drive.reach("postcopy-active")
    await drive.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
    await drive.reach("completed")


async def run(socket, uri, scenario):
    client, listener = QMPClient("drive"), EventListener()
    with client.listen(listener):
        await client.connect(socket)
        drive = Drive(client, listener, uri)
        await scenario(drive)
        told = {
            "greeting": client.greeting._asdict(),
            "states": drive.states,
            "seen": drive.seen,
            "parameters": await drive.execute("query-migrate-parameters"),
            "capabilities": await drive.execute("query-migrate-capabilities"),
            "status": await drive.execute("query-status"),
            "version": await drive.execute("query-version"),
        }
        print(json.dumps(told))
        try:
            await drive.execute("quit")
        except (EOFError, ConnectionError, QMPError) as error:
            print(f"quit: the connection ended before its answer: {error}", file=sys.stderr)
        try:
            await client.disconnect()
        except EOFError:
            # The monitor has ended first, as it was told.
            pass


if __name__ == "__main__":
    scenarios = {made.__name__: made for made in (plain, multifd, cancelled, failed, postcopy)}
    asyncio.run(asyncio.wait_for(run(sys.argv[1], sys.argv[2], scenarios[sys.argv[3]]), LIMIT))
