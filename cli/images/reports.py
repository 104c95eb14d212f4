"""``podkeel image explain``, ``verify``, ``df`` and ``check``: pulls, signatures, disk space, broken images."""

from __future__ import annotations

import argparse

from cli.connect import connect
from cli.images.images import credentials
from cli.text import number, short, size, table
from proto.podkeel.v1 import agent_pb2


def explain(options: argparse.Namespace) -> int:
    """Print every host that a pull tries, with which credentials, and its answer; 1 if none has the image."""
    request = agent_pb2.ExplainImageRequest(reference=options.reference, auth=credentials(options))
    with connect(options) as client:
        answer = client.call(request, agent_pb2.ExplainImageResponse, f"explain image {options.reference}")
    print(explanation(answer))
    return 0 if any(host.answered for host in answer.hosts) else 1


def explanation(answer: agent_pb2.ExplainImageResponse) -> str:
    """A paragraph for each host in the order they are tried; ✓ marks the one a pull would take."""
    lines = [answer.reference]
    taken = next((host for host in answer.hosts if host.answered), None)
    for host in answer.hosts:
        mark = "✓" if host is taken else "·" if host.answered else "✗"
        lines += [
            f"{mark} {host.address}{'  (mirror)' if host.mirror else ''}",
            f"    configured by  {host.configured_in}",
            f"    credentials    {host.credentials}",
            f"    answer         {host.answer}",
        ]
    if answer.policy:
        lines.append(f"signatures         {answer.policy}")
    return "\n".join(lines)


def verify(options: argparse.Namespace) -> int:
    """Print what the node's policy says about the signatures of an image; 1 if it is not accepted."""
    request = agent_pb2.VerifyImageRequest(reference=options.reference, auth=credentials(options))
    with connect(options) as client:
        answer = client.call(request, agent_pb2.VerifyImageResponse, f"verify image {options.reference}")
    print(f"{answer.reference}  {answer.digest}")
    print(answer.policy or "no policy (images.signature_policy): every image is accepted")
    for found in answer.requirements:
        print(f"{'✓' if found.met else '✗'} {found.requirement}: {found.reason}")
    return 0 if all(found.met for found in answer.requirements) else 1


def disk_usage(options: argparse.Namespace) -> None:
    """A line for each image with what its removal would free, the largest first, and the sums."""
    with connect(options) as client:
        answer = client.call(agent_pb2.DiskUsageRequest(), agent_pb2.DiskUsageResponse, "ask for disk usage")
    rows = []
    for item in sorted(answer.images, key=lambda item: (-item.bytes, item.id)):
        name = item.references[0] if item.references else "-"
        rows.append((name, short(item.id), size(item.bytes), size(item.unique_bytes), item.containers or ""))
    print(table(("IMAGE", "ID", "ON DISK", "UNSHARED", "CONTAINERS"), rows))
    idle = sum(item.unique_bytes for item in answer.images if not item.containers)
    print(
        f"\nlayers {size(answer.layer_bytes)}, kept compressed {size(answer.blob_bytes)}, "
        f"written by containers {size(answer.container_bytes)}\n"
        f"images without containers alone hold {size(idle)}"
    )


def check(options: argparse.Namespace) -> int:
    """Print what is broken; 1 if a part of it was not repaired."""
    request = agent_pb2.CheckImagesRequest(repair=options.repair)
    with connect(options) as client:
        answer = client.call(request, agent_pb2.CheckImagesResponse, "check images", timeout=None)
    for finding in answer.findings:
        print(f"{finding.digest}  {finding.problem}")
        print(f"    of {', '.join(finding.images) or 'no image'}{f'; {finding.repair}' if finding.repair else ''}")
    counted = f"{number(answer.images, 'image')}, {number(answer.layers, 'layer')}"
    print(f"{counted}: {len(answer.findings) or 'nothing'} broken")
    return 1 if any(not finding.repair for finding in answer.findings) else 0
