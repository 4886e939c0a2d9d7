"""Finds engines: reads the directory again and again.

Run by ``api.server``. While the directory does not answer, the last known engines are used. Must not know the
requests.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from farshore.errors import FarshoreError
from farshore.gateway.engines.known import KnownEngines
from farshore.kvstore.directory.base import Directory

PERIOD_S = 0.5
SEARCH_PERIOD_S = 0.1
"""While no engine takes requests: the first one is to be found as soon as it serves."""

_logger = logging.getLogger(__name__)


class EngineDiscovery:
    """Tells ``engines`` what ``directory`` lists. The directory's calls block, so they have a thread."""

    def __init__(self, directory: Directory, engines: KnownEngines) -> None:
        self._directory = directory
        self._engines = engines
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="directory")
        self._answers = True

    async def watch(self) -> None:
        """Looks until the task is cancelled. A look raises nothing."""
        while True:
            await asyncio.sleep(PERIOD_S if self._engines.problem is None else SEARCH_PERIOD_S)
            await self.look()

    async def look(self) -> None:
        """Looks once."""
        loop = asyncio.get_running_loop()
        try:
            self._engines.apply(await loop.run_in_executor(self._thread, self._directory.listing))
        except FarshoreError as error:
            if self._answers:
                _logger.warning("the directory does not answer; going on with the known engines: %s", error)
            self._answers = False
            return
        except Exception:
            # A directory of another version, or something else at its address.
            if self._answers:
                _logger.exception("the directory's answer makes no sense; going on with the known engines")
            self._answers = False
            return
        self._answers = True

    def stop(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
