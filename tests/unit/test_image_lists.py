"""Lists of images hold all that the CRI's messages can hold."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from cri.services.image_service import ImageService, to_message
from host.errors import PodkeelError
from images.image import Image, read_config
from images.oci.manifests import parse_manifest
from proto.runtime.v1 import cri_pb2


def image(content: bytes = b"{}") -> Image:
    file = read_config(content, "it")
    return Image(file.digest, "", ("a.example/b:1",), (), 1, file.config, (), (), pinned=False)


async def test_an_image_that_cannot_be_encoded_is_left_out() -> None:
    good = image()
    odd = dataclasses.replace(image(b'{"os": "linux"}'), size=-1)
    store = SimpleNamespace(images=lambda: (odd, good), revision=1)
    service = ImageService(cast(Any, SimpleNamespace(images=SimpleNamespace(store=store, snapshots=None, puller=None))))
    listed = cri_pb2.ListImagesResponse.FromString(await service.list_images(cri_pb2.ListImagesRequest()))
    assert [found.id for found in listed.images] == [good.id]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
USERS = st.text(max_size=30) | st.integers().map(str) | st.none()
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "os": JSON,
        "architecture": JSON,
        "config": JSON
        | st.fixed_dictionaries(
            {},
            optional={
                "User": USERS | JSON,
                "Env": st.lists(st.text(max_size=9) | st.none(), max_size=3) | JSON,
                "Labels": st.dictionaries(st.text(max_size=9), st.text(max_size=9) | st.none(), max_size=3) | JSON,
                "Volumes": JSON,
                "Cmd": JSON,
            },
        ),
        "rootfs": JSON | st.fixed_dictionaries({"diff_ids": JSON}),
    },
)
MANIFESTS = st.dictionaries(
    st.sampled_from(["schemaVersion", "mediaType", "config", "layers", "manifests", "annotations", "Layers"]), JSON
)


@given(CONFIGS | JSON)
def test_any_config_is_refused_or_reported(content: object) -> None:
    try:
        found = image(json.dumps(content).encode())
    except PodkeelError:
        return
    cri_pb2.Image.FromString(to_message(found).SerializeToString())


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(content: bytes) -> None:
    for read in (read_config, parse_manifest):
        with contextlib.suppress(PodkeelError):
            read(content, "it")


@given(MANIFESTS, st.text(max_size=10))
def test_any_manifest_is_refused_or_read(content: object, media_type: str) -> None:
    with contextlib.suppress(PodkeelError):
        parse_manifest(json.dumps(content).encode(), "it", media_type)
