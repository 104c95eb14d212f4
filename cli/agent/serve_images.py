"""``podkeel serve-images``."""

from __future__ import annotations

import argparse

from cli.agent.config import load_for
from cli.agent.rights import need_root
from host.errors import InvalidArgumentError


def serve_images(options: argparse.Namespace) -> int:
    """Serve images to other nodes in this process until a signal ends it."""
    from cri.image_server import ServingOptions
    from cri.image_server import serve_images as serve

    loaded = load_for(options)
    need_root("serve-images")
    if not options.token_file and not options.anonymous:
        raise InvalidArgumentError(
            "serve-images: who may get images? Give --token-file FILE, or --anonymous for everybody who can connect"
        )
    host, colon, port = options.listen.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise InvalidArgumentError(f"--listen: expected HOST:PORT such as 10.0.0.1:5000, got {options.listen!r}")
    serve(
        loaded.configuration,
        ServingOptions(
            options.listen,
            options.tls_cert,
            options.tls_key,
            options.tls_client_ca,
            "" if options.anonymous else options.token_file,
            options.pull,
        ),
    )
    return 0
