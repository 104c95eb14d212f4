"""The agent as a process: opens everything, serves the CRI on a unix socket, and leaves its pods running."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cri.activation import ActivatedSocket
from cri.config.configuration import Configuration
from cri.config.options import StreamingOptions
from cri.connections import keep_room
from cri.methods import CallObserver, service_handlers
from cri.observation import Observation
from cri.reload import Reloader
from cri.service_reports import report_start, report_work, status_line
from cri.services.agent_service import AgentService
from cri.services.image_service import ImageService
from cri.services.runtime_service import RuntimeService
from cri.stream_backend import NodeBackend
from cri.streaming.limits import StreamLimits
from cri.streaming.server import StreamingServer
from cri.telemetry.diagnosis import write_on_signal
from cri.telemetry.logs import LogLevel, configure_logging
from cri.version import VERSION
from host import libc
from host.concurrency.priority import raise_priority
from host.files import descriptors
from host.systemd import ServiceManager
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from runtime.agent import Agent
from runtime.recovery.lost_store import LostStore

MESSAGE_LIMIT = 16 * 1024 * 1024
CONNECTION_LIMIT = 1000  # of the socket; fewer where the agent may have few descriptors
HANDSHAKE_SECONDS = 5.0
IDLE_SECONDS = 60.0  # after this time without calls the client of a connection is asked to connect again
STOP_SECONDS = 5.0
SWITCH_SECONDS = 0.0005  # how long a thread busy with Python keeps the loop waiting; Python's own 5 ms add up in calls
_HEALTHY = ("", "runtime.v1.RuntimeService", "runtime.v1.ImageService")  # names in the health service of gRPC
_HEAP_ARENAS = 2
_UMASK = (
    0o022  # independent of the agent's parent: files for containers are readable, private ones get an explicit mode
)

_log = logging.getLogger("podkeel.server")


def serve(read: Callable[[], Configuration], *, adopt: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; with ``adopt`` a store that is lost is replaced by its copy.

    ``read`` reads the configuration: at the start, and again for each reload. Raises PodkeelError when the agent cannot
    start.
    """
    configuration = read()
    os.umask(_UMASK)
    manager = ServiceManager.of_environment()
    libc.limit_heap_arenas(_HEAP_ARENAS)
    descriptors.raise_limit()
    _write_no_core_dumps()
    configure_logging(configuration.log)
    sys.setswitchinterval(SWITCH_SECONDS)
    raise_priority()
    path = _socket_path(configuration.server.socket)
    activated = ActivatedSocket(manager.sockets.get(str(path)), path)
    try:
        lost_store = LostStore.ADOPT if adopt else LostStore.REFUSE
        asyncio.run(_serve(configuration, read, lost_store, manager, activated))
    finally:
        activated.put_back()


def _write_no_core_dumps() -> None:
    """Set the agent's soft core limit to 0, as its memory holds passwords and containers' environments.

    The hard limit is raised where that is permitted: containers get it as theirs, and a service has 0 for both.
    """
    with contextlib.suppress(ValueError, PermissionError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


async def _serve(
    configuration: Configuration,
    read: Callable[[], Configuration],
    lost_store: LostStore,
    manager: ServiceManager,
    activated: ActivatedSocket,
) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    path = _socket_path(configuration.server.socket)
    log_level = LogLevel(configuration.log.level)
    # SIGHUP: the terminal closed, or a reload before the agent serves
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    loop.add_signal_handler(signal.SIGUSR1, log_level.show_everything)
    loop.add_signal_handler(signal.SIGUSR2, log_level.show_configured)
    write_on_signal(loop)
    manager.status("starting: compares the store with the node")
    start = asyncio.create_task(report_start(manager))
    async with AsyncExitStack() as stack:
        stack.callback(start.cancel)
        options = configuration.runtime, configuration.network, configuration.images
        plugins, checkpoint = configuration.nri, configuration.checkpoint
        agent = Agent(*options, lost_store, nri=plugins, checkpoint=checkpoint, version=VERSION)
        await stack.enter_async_context(agent)
        os.chdir(agent.layout.run)  # conmon writes a file for each out-of-memory kill to its working directory
        await asyncio.to_thread(activated.make_way)
        observation = await stack.enter_async_context(Observation(agent, configuration))
        reloader = Reloader(
            configuration,
            read,
            agent=agent,
            manager=manager,
            log_level=log_level,
            serve_metrics=observation.serve_metrics,
        )
        streams = StreamingServer(NodeBackend(agent), _stream_limits(configuration.streaming))
        await streams.start()
        health_service = health.aio.HealthServicer()
        server = _grpc_server(agent, streams, reloader, observation.observers, health_service)
        server.add_insecure_port(f"unix:{path}")
        _set_garbage_aside()
        await server.start()
        for service in _HEALTHY:
            await health_service.set(service, health_pb2.HealthCheckResponse.SERVING)
        path.chmod(0o660)
        _log.info("agent: serving the CRI on unix://%s", path)
        start.cancel()
        reloads: set[asyncio.Task[None]] = set()
        loop.add_signal_handler(signal.SIGHUP, lambda: _begin(reloader.on_signal(), reloads))
        manager.ready(status_line(agent))
        work = keep_room(path, _connection_limit() * 7 // 8), report_work(manager, agent), activated.relay()
        tasks = [asyncio.create_task(coroutine) for coroutine in work]
        try:
            await ended.wait()
        finally:
            for task in (*tasks, *reloads):
                task.cancel()
            manager.stopping()
            _log.info("agent: stopping: pods keep running")
            agent.state.events.close()
            await streams.close()
            await health_service.enter_graceful_shutdown()
            await server.stop(STOP_SECONDS)


def _begin(work: Coroutine[Any, Any, None], running: set[asyncio.Task[None]]) -> None:
    task = asyncio.create_task(work)
    running.add(task)
    task.add_done_callback(running.discard)


def _grpc_server(
    agent: Agent,
    streams: StreamingServer,
    reloader: Reloader,
    observers: Sequence[CallObserver],
    health_service: health.aio.HealthServicer,
) -> grpc.aio.Server:
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MESSAGE_LIMIT),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", 1000),
            # The server closes connections of clients that send nothing at first, or nothing for a long time.
            ("grpc.max_allowed_incoming_connections", _connection_limit()),
            ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
            ("grpc.max_connection_idle_ms", int(IDLE_SECONDS * 1000)),
        ]
    )
    services = {"RuntimeService": RuntimeService(agent, streams), "ImageService": ImageService(agent)}
    handlers = service_handlers(cri_pb2.DESCRIPTOR, services, observers)
    handlers += service_handlers(agent_pb2.DESCRIPTOR, {"Agent": AgentService(agent, reloader)}, observers)
    server.add_generic_rpc_handlers(tuple(handlers))
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    return server


def _connection_limit() -> int:
    return max(16, min(CONNECTION_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))


def _stream_limits(options: StreamingOptions) -> StreamLimits:
    host, _, port = options.address.rpartition(":")
    return StreamLimits(
        host=host.strip("[]"),
        port=int(port),
        idle_timeout=options.idle_seconds,
        creation_timeout=options.creation_seconds,
        tls_certificate=options.tls_certificate or None,
        tls_key=options.tls_key or None,
        tls_client_ca=options.tls_client_ca or None,
    )


def _socket_path(address: str) -> Path:
    return Path(address.removeprefix("unix://")).absolute()


def _set_garbage_aside() -> None:
    """Exclude what is loaded now from Python's garbage collection.

    The collector would stop the loop for 25 ms and find nothing.
    """
    gc.collect()
    gc.freeze()
