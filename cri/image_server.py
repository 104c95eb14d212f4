"""``podkeel serve-images`` as a process: serves the agent's images, and has the agent pull those that are missing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from cri.config.configuration import Configuration
from cri.telemetry.logs import configure_logging
from host.errors import InvalidArgumentError, NotFoundError, UnavailableError
from host.listener import tls_context
from host.systemd import ServiceManager
from images.serving.catalog import Catalog
from images.serving.requests import Wanted
from images.serving.server import ImageServer
from proto.runtime.v1 import cri_pb2

# Clients wait about a minute for an answer. A pull that needs more time continues, and a later request finds its image.
PULL_ANSWER_SECONDS = 50.0
PULLS_AT_ONCE = 4
_PULL = "/runtime.v1.ImageService/PullImage"
_SHORTEST_TOKEN = 16
_LARGEST_TOKEN_FILE = 1 << 20

_log = logging.getLogger("podkeel.serving")


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """Where images are served (``HOST:PORT``), with which PEM files, and to whom.

    ``token_file`` has a token in each line; empty: everybody gets every image. With ``pull``, the agent pulls images
    that are missing.
    """

    listen: str
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    token_file: str = ""
    pull: bool = False


def serve_images(configuration: Configuration, options: ServingOptions) -> None:
    """Serve the images of the agent with this ``configuration`` until SIGTERM or SIGINT.

    Raises InvalidArgumentError for unusable files, UnavailableError if the address cannot be listened on.
    """
    configure_logging(configuration.log)
    tls = tls_context("serve-images", options.tls_certificate, options.tls_key, options.tls_client_ca)
    tokens = read_tokens(Path(options.token_file)) if options.token_file else None
    if not configuration.images.keep_blobs:
        _log.warning("images: images.keep_blobs is off: only images from before that was set can be served")
    asyncio.run(_serve(configuration, options, tls, tokens))


def read_tokens(path: Path) -> list[bytes]:
    """The tokens in a file, one a line. Raises InvalidArgumentError without any, and for a short one."""
    try:
        with path.open("rb") as file:
            lines = file.read(_LARGEST_TOKEN_FILE).split(b"\n")
    except OSError as error:
        raise InvalidArgumentError(f"token file {path} cannot be read: {error.strerror}") from error
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens or min(map(len, tokens)) < _SHORTEST_TOKEN:
        raise InvalidArgumentError(f"token file {path}: each line must be a token of {_SHORTEST_TOKEN} bytes or more")
    return tokens


async def _serve(
    configuration: Configuration, options: ServingOptions, tls: ssl.SSLContext | None, tokens: list[bytes] | None
) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    manager = ServiceManager.of_environment()
    catalog = Catalog(Path(configuration.runtime.data_dir))
    async with contextlib.AsyncExitStack() as stack:
        fetch = None
        if options.pull:
            agent = Agent(configuration.server.socket)
            stack.push_async_callback(agent.close)
            fetch = agent.pull
        server = ImageServer(catalog, tokens=tokens, tls=tls, fetch=fetch)
        host, _, port = options.listen.rpartition(":")
        try:
            bound = await server.start(host.strip("[]"), int(port))
        except OSError as error:
            raise UnavailableError(f"{options.listen} cannot be listened on: {error.strerror}") from error
        stack.push_async_callback(server.close)
        where = f"{'https' if tls else 'http'}://{host}:{bound}/v2/"
        _log.info("images of %s: serving on %s", configuration.runtime.data_dir, where)
        manager.ready(f"serving images on {where}")
        await stopped.wait()
        manager.stopping()


class Agent:
    """The agent at ``socket``, which pulls images. Requests for the same image share a pull."""

    def __init__(self, socket: str) -> None:
        self._channel = grpc.aio.insecure_channel(socket, options=[("grpc.default_authority", "localhost")])
        self._pulls: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Cancel the pulls, and end the connection."""
        for pull in self._pulls.values():
            pull.cancel()
        await asyncio.gather(*self._pulls.values(), return_exceptions=True)
        await self._channel.close()

    async def pull(self, wanted: Wanted) -> None:
        """Have the agent pull an image. Raises NotFoundError, or UnavailableError if it takes too long or fails."""
        separator = "@" if ":" in wanted.reference else ":"
        name = f"{wanted.repository}{separator}{wanted.reference}"
        pull = self._pulls.get(name)
        if pull is None:
            if len(self._pulls) >= PULLS_AT_ONCE:
                raise UnavailableError(f"image {name} is missing here, and {PULLS_AT_ONCE} others are being pulled")
            pull = self._pulls[name] = asyncio.create_task(self._pull(name))
            pull.add_done_callback(functools.partial(self._ended, name))
        done, _ = await asyncio.wait((pull,), timeout=PULL_ANSWER_SECONDS)
        if not done:
            raise UnavailableError(f"image {name} is being pulled: ask again later")
        if pull.cancelled():
            raise UnavailableError("the image server is stopping")
        pull.result()

    def _ended(self, name: str, pull: asyncio.Task[None]) -> None:
        del self._pulls[name]
        if not pull.cancelled() and (error := pull.exception()) is not None:
            _log.warning("%s", error)

    async def _pull(self, name: str) -> None:
        call = self._channel.unary_unary(
            _PULL,
            request_serializer=cri_pb2.PullImageRequest.SerializeToString,
            response_deserializer=cri_pb2.PullImageResponse.FromString,
        )
        try:
            await call(cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=name)))
        except grpc.aio.AioRpcError as error:
            kind = NotFoundError if error.code() is grpc.StatusCode.NOT_FOUND else UnavailableError
            raise kind(f"image {name} cannot be pulled by the agent: {error.details()}") from error
