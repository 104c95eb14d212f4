"""GPG signatures of images below an address of registries.d.

Document: containers-registries.d(5); containers-signature(5).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiohttp

from host import untrusted_json
from host.concurrency.threads import in_image_thread
from host.errors import KubeletReasonError
from host.untrusted_json import JsonError
from images.oci.reference import Reference
from images.signatures.claims import MAX_CLAIM_BYTES

MAX_SIGNATURES = 32  # signatures of one image

_SECONDS = 60.0  # of one signature
ALL_SECONDS = 120.0


async def simple_signatures(lookaside: str, name: Reference, digest: str) -> AsyncGenerator[bytes, None]:
    """The GPG signatures of the manifest ``digest`` below an address of registries.d, MAX_SIGNATURES at most.

    Raises KubeletReasonError if the place cannot be asked, or if all answers take more than two minutes.
    """
    address = urlsplit(lookaside)
    if address.scheme not in ("file", "http", "https"):
        raise _failed(f"{lookaside!r} is no address of signatures: it must begin with file://, http:// or https://")
    below = f"{address.path.rstrip('/')}/{name.path}@{digest.replace(':', '=')}"
    if address.scheme == "file":
        for number in range(1, MAX_SIGNATURES + 1):
            content = await in_image_thread(_read, Path(unquote(f"{below}/signature-{number}")))
            if content is None:
                return
            yield content
        return
    end = time.monotonic() + ALL_SECONDS
    async with aiohttp.ClientSession(trust_env=True) as session:
        for number in range(1, MAX_SIGNATURES + 1):
            url = f"{address.scheme}://{address.netloc}{below}/signature-{number}"
            content = await _get(session, url, min(_SECONDS, end - time.monotonic()))
            if content is None:
                return
            yield content


def _read(path: Path) -> bytes | None:
    try:
        return untrusted_json.read_file(path, MAX_CLAIM_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, JsonError) as error:
        raise _failed(f"{path} cannot be read: {error}") from error


async def _get(session: aiohttp.ClientSession, url: str, seconds: float) -> bytes | None:
    if seconds <= 0:
        raise KubeletReasonError("RegistryUnavailable", f"signatures at {url}: no answer in {ALL_SECONDS:g} s")
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=seconds)) as response:
            if response.status == 404:
                return None
            if response.status != 200:
                raise _failed(f"{url} answers with status {response.status}")
            content = bytearray()
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > MAX_CLAIM_BYTES:
                    raise _failed(f"{url} is larger than {MAX_CLAIM_BYTES} bytes")
            return bytes(content)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        reason = str(error) or "no answer in time"
        raise KubeletReasonError("RegistryUnavailable", f"signatures at {url}: {reason}") from error


def _failed(why: str) -> KubeletReasonError:
    return KubeletReasonError("SignatureValidationFailed", why)
