"""The observers of calls: metrics and traces, as configured."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cri.config.configuration import Configuration
from cri.config.options import MetricsOptions
from cri.methods import CallObserver
from runtime.agent import Agent

if TYPE_CHECKING:
    from cri.telemetry.monitoring import Monitoring


class Observation:
    """Metrics and traces, for ``async with``; their packages are imported only if they are configured.

    ``observers`` is read for each call.
    """

    def __init__(self, agent: Agent, configuration: Configuration) -> None:
        self.observers: list[CallObserver] = []
        self._agent = agent
        self._configuration = configuration
        self._monitoring: Monitoring | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._stack.aclose)
            if self._configuration.metrics.address:
                await self.serve_metrics(self._configuration.metrics)
            if self._configuration.tracing.endpoint:
                from cri.telemetry.tracing import tracing

                traces = tracing(self._agent.state, self._configuration.tracing)
                self.observers.append(await self._stack.enter_async_context(traces))
            stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def serve_metrics(self, options: MetricsOptions) -> None:
        """Serve metrics as ``options`` say; nothing with an empty address. Raises as ``Monitoring.serve`` does."""
        if self._monitoring is not None:
            await self._monitoring.serve(options)
        elif options.address:
            from cri.telemetry.monitoring import monitoring

            self._monitoring = await self._stack.enter_async_context(monitoring(self._agent, options))
            self.observers.append(self._monitoring.calls)
