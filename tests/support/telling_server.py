"""`python -m tests.support.telling_server serve …`: `xlane`, which at SIGUSR1 says in its log how many tasks its event loop has."""

import asyncio
import signal
import sys

from xlane.server import cli, session


class Telling(session.Session):
    async def run(self) -> int:
        def tell() -> None:
            print(f"tasks {len(asyncio.all_tasks())}", flush=True)

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
        return await super().run()


if __name__ == "__main__":
    session.Session = Telling
    sys.exit(cli.main())
