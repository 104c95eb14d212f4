"""Runs the node owner's verifier programs, which allow or refuse a pull, for example by the image's signature.

Document: containerd's docs/image-verification.md ("Image Verifier Binary API"), so its verifiers work here too.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from host import processes
from host.concurrency.threads import in_image_thread
from host.errors import KubeletReasonError, PodkeelError
from images.oci.manifests import Descriptor
from images.oci.reference import Reference
from images.options import ImageOptions

_STDIN_TYPE = "application/vnd.oci.descriptor.v1+json"
_OUTPUT_LIMIT = 16 << 10
_REASON_LIMIT = 500


async def verify(options: ImageOptions, name: Reference, descriptor: Descriptor) -> None:
    """Run every program of the configured folder. Each must end with status 0 in time.

    A program gets the pulled name and its digest as arguments and the descriptor of the manifest on standard input. It
    prints its reason on standard output. Raises KubeletReasonError ``SignatureValidationFailed`` if a program refuses,
    fails or is too slow, and if the folder cannot be read. An empty folder refuses nothing.
    """
    if not options.verifier_dir:
        return
    subject = f"image {name} ({descriptor.digest})"
    try:
        programs = await in_image_thread(_programs, Path(options.verifier_dir))
    except OSError as error:
        raise _failed(f"{subject}: verifiers in {options.verifier_dir} cannot be read: {error.strerror}") from error
    for program in programs:
        command = (str(program), "-name", str(name), "-digest", descriptor.digest, "-stdin-media-type", _STDIN_TYPE)
        try:
            done = await processes.run(
                command,
                stdin=msgspec.json.encode(descriptor),
                timeout=options.verifier_seconds,
                check=False,
                limit=_OUTPUT_LIMIT,
            )
        except (PodkeelError, OSError) as error:
            raise _failed(f"{subject}: verifier {program.name} failed: {error}") from error
        if done.status != 0:
            reason = " ".join(done.stdout.decode(errors="replace").split())[:_REASON_LIMIT]
            raise _failed(f"{subject}: verifier {program.name} refused it: {reason or f'status {done.status}'}")


def _programs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.is_dir())


def _failed(message: str) -> KubeletReasonError:
    return KubeletReasonError("SignatureValidationFailed", message)
