from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from host.errors import InvalidArgumentError, UnsupportedError
from images.content.manifest_search import Document, Wanted, advance, find_image
from images.oci.digests import digest_of
from images.oci.manifests import DOCKER_LIST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from images.oci.platforms import Platform, suitability, this_machine

AMD64 = Platform("linux", "amd64")
V7 = Platform("linux", "arm", "v7")


class Shelf:
    """Documents by digest, and the order in which a search asks for them."""

    def __init__(self) -> None:
        self.documents: dict[str, bytes] = {}
        self.asked: list[str] = []

    def put(self, content: object, media_type: str, **more: object) -> dict[str, object]:
        encoded = json.dumps(content).encode()
        self.documents[digest_of(encoded)] = encoded
        return {"mediaType": media_type, "digest": digest_of(encoded), "size": len(encoded), **more}

    def image(self, platform: str, *, said: bool | None = True, **more: object) -> dict[str, object]:
        """An image whose config says ``platform``; its entry says it too, or nothing, or (None) an empty platform."""
        os_name, architecture, variant = [*platform.split("/"), "", ""][:3]
        fields = {"os": os_name, "architecture": architecture, "variant": variant}
        config = self.put(fields if platform else {}, OCI_CONFIG)
        if said is not False:
            more["platform"] = fields if said else {}
        return self.put({"schemaVersion": 2, "config": config, "layers": []}, OCI_MANIFEST, **more)

    def index(self, *entries: Mapping[str, object], **more: object) -> dict[str, object]:
        return self.put({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}, OCI_INDEX, **more)

    def attestation(self, **more: object) -> dict[str, object]:
        config = self.put({}, "application/vnd.in-toto+json")
        return self.put({"schemaVersion": 2, "config": config, "layers": []}, OCI_MANIFEST, **more)

    def found(self, top: Mapping[str, object], machine: Platform = AMD64) -> str:
        """The platform that the config of the image says which a search comes to."""
        self.asked = []
        digest = str(top["digest"])
        search = find_image(Document(self.documents[digest]), digest, machine, "it")
        result = advance(search, None)
        while isinstance(result, Wanted):
            self.asked.append(result.descriptor.digest)
            result = advance(search, Document(self.documents[result.descriptor.digest]))
        assert digest_of(result.content) == result.digest
        return str(result.config.platform)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def test_the_best_platform_is_chosen(shelf: Shelf) -> None:
    offered = [shelf.image(name) for name in ("linux/arm/v5", "linux/arm/v6", "linux/arm64/v8", "windows/arm/v7")]
    assert shelf.found(shelf.index(*offered), V7) == "linux/arm/v6"
    assert len(shelf.asked) == 2, "a manifest and a config"
    assert shelf.found(shelf.index(*offered, shelf.image("linux/arm/v7")), V7) == "linux/arm/v7"
    assert shelf.found(shelf.index(shelf.image("linux/amd64/v3"), shelf.image("linux/amd64"))) == "linux/amd64"
    with pytest.raises(InvalidArgumentError, match="it has linux/amd64/v2, linux/amd64/v3"):
        shelf.found(shelf.index(shelf.image("linux/amd64/v3"), shelf.image("linux/amd64/v2")))
    assert shelf.found(shelf.index(shelf.image("linux/arm64")), Platform("linux", "arm64", "v8")) == "linux/arm64"
    with pytest.raises(InvalidArgumentError, match="it has linux/arm/v7"):
        shelf.found(shelf.index(shelf.image("linux/arm/v7")), Platform("linux", "arm", "v6"))
    with pytest.raises(InvalidArgumentError, match="it has none"):
        shelf.found(shelf.index())
    assert suitability(this_machine(), this_machine()) == 100


def test_platforms_go_by_many_names(shelf: Shelf) -> None:
    for name in ("linux/amd64/v1", "linux/x86_64", "Linux/AMD64", "linux/amd64/1"):
        assert suitability(Platform(*name.split("/")), AMD64) == 100, name
        assert shelf.found(shelf.index(shelf.image("linux/arm64"), shelf.image(name))) == name
    assert suitability(Platform("linux", "amd64", "v2"), AMD64) == 0
    assert suitability(Platform("linux", "aarch64"), Platform("linux", "arm64", "v8")) == 100
    assert suitability(Platform("linux", "arm", "7"), V7) == 100
    assert suitability(Platform("linux", "arm", "v\u0667"), V7) == 0


def test_an_older_architecture_is_taken_where_there_is_nothing_better(shelf: Shelf) -> None:
    old, arm64 = shelf.image("linux/386"), Platform("linux", "arm64", "v8")
    assert shelf.found(shelf.index(shelf.image("linux/arm/v7"), old)) == "linux/386"
    assert shelf.found(shelf.index(old, shelf.image("linux/amd64"))) == "linux/amd64"
    assert shelf.found(shelf.index(old, shelf.image("linux/amd64", said=False))) == "linux/amd64"
    assert shelf.found(shelf.index(old, shelf.image("linux/arm64", said=False))) == "linux/386"
    arms = [shelf.image(name) for name in ("linux/arm/v5", "linux/arm/v7", "linux/arm/v6", "linux/386")]
    assert shelf.found(shelf.index(*arms), arm64) == "linux/arm/v7"
    assert len(shelf.asked) == 2, "worse ones are not looked at"
    assert shelf.found(shelf.index(*arms, shelf.image("linux/arm64")), arm64) == "linux/arm64"
    assert shelf.found(shelf.index(shelf.image("linux/arm/v6"), shelf.image("linux/arm")), arm64) == "linux/arm"
    for name, machine in (("linux/amd64", Platform("linux", "386")), ("linux/arm64", V7), ("linux/arm/v9", arm64)):
        assert suitability(Platform(*name.split("/")), machine) == 0, name
    assert suitability(Platform("windows", "386"), AMD64) == 0


def test_entries_without_platform_are_distinguished_by_their_configs(shelf: Shelf) -> None:
    arm, amd = shelf.image("linux/arm64", said=False), shelf.image("linux/amd64", said=False)
    assert shelf.found(shelf.index(arm, amd)) == "linux/amd64"
    assert shelf.found(shelf.index(amd, arm)) == "linux/amd64"
    empty = [shelf.image("linux/arm64", said=None), shelf.image("linux/amd64", said=None)]
    assert shelf.found(shelf.index(*empty)) == "linux/amd64"
    older, newer = shelf.image("linux/arm/v6", said=False), shelf.image("linux/arm/v7", said=False)
    assert shelf.found(shelf.index(older, newer), V7) == "linux/arm/v7"
    for entries in ([arm], [arm, shelf.image("windows/amd64", said=False)]):
        with pytest.raises(InvalidArgumentError, match="it has linux/arm64"):
            shelf.found(shelf.index(*entries))
    assert shelf.found(shelf.index(shelf.image("", said=False))) == "", "a config that says nothing is taken"
    assert shelf.found(shelf.index(shelf.image("", said=False), amd)) == "linux/amd64"
    assert shelf.found(shelf.index(arm, shelf.image("linux/amd64"))) == "linux/amd64"
    assert len(shelf.asked) == 2, "what names this platform is taken without a look at the others"


def test_attestations_are_passed_over(shelf: Shelf) -> None:
    amd = shelf.image("linux/amd64", said=False)
    annotated = shelf.attestation(annotations={"vnd.docker.reference.type": "attestation-manifest"})
    unknown = shelf.attestation(platform={"os": "unknown", "architecture": "unknown"})
    for entries in ([annotated, amd], [unknown, amd], [shelf.attestation(), amd]):
        assert shelf.found(shelf.index(*entries)) == "linux/amd64"
    with pytest.raises(InvalidArgumentError, match="it has none"):
        shelf.found(shelf.index(annotated, unknown))
    with pytest.raises(UnsupportedError, match="artifact"):
        shelf.found(shelf.attestation())


def test_an_image_outside_of_an_index_is_taken_as_it_is(shelf: Shelf) -> None:
    assert shelf.found(shelf.image("linux/arm64")) == "linux/arm64"


def test_indexes_within_indexes(shelf: Shelf) -> None:
    inner = shelf.index(shelf.image("linux/arm64"), shelf.image("linux/amd64"))
    assert shelf.found(shelf.index(shelf.index(shelf.image("linux/s390x")), inner)) == "linux/amd64"
    for _ in range(5):
        inner = shelf.index(inner)
    with pytest.raises(InvalidArgumentError, match="nests more than 4"):
        shelf.found(inner)
    many = [shelf.index(shelf.image(f"linux/a{number}", said=False)) for number in range(50)]
    with pytest.raises(InvalidArgumentError, match="more than 40"):
        shelf.found(shelf.index(*many))


def test_what_the_entry_says_must_hold(shelf: Shelf) -> None:
    image = shelf.image("linux/amd64")
    with pytest.raises(InvalidArgumentError, match="it is ambiguous"):
        shelf.found(shelf.index({**image, "mediaType": DOCKER_LIST}))
