"""``podkeel checkpoint-pod``."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from cli.connect import connect
from cli.lookup import find_pod, list_containers
from host.errors import InvalidArgumentError, WrongStateError
from proto.runtime.v1 import cri_pb2


def checkpoint_pod(options: argparse.Namespace) -> None:
    """Write the running containers of a pod to a folder, and print its path.

    Raises NotFoundError, WrongStateError if none runs, and InvalidArgumentError for a folder that cannot be made.
    """
    folder = Path(options.folder).absolute()
    with connect(options) as client:
        pod = find_pod(client, options.pod)
        running = [each.id for each in list_containers(client, pod.id) if each.state == cri_pb2.CONTAINER_RUNNING]
        if not running:
            raise WrongStateError(f"pod {options.pod!r} has no running container: there is nothing to save")
        request = cri_pb2.CheckpointPodRequest(
            pod_sandbox_id=pod.id,
            output_path=str(folder),
            container_ids=running,
            options={"sessions": "leave-out"} if options.leave_out_sessions else {},
        )
        made = _make(folder)
        try:
            what = f"checkpoint pod {options.pod!r}"
            client.call(request, cri_pb2.CheckpointPodResponse, what, timeout=options.timeout or None)
        except BaseException:
            if made:
                with suppress(OSError):  # it is not empty while the agent cleans up
                    folder.rmdir()
            raise
    print(folder)


def _make(folder: Path) -> bool:
    """Make the folder; False if it is there."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return False
    except OSError as error:
        raise InvalidArgumentError(f"folder {folder} cannot be made: {error.strerror}") from error
    return True
