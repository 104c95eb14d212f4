from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host.errors import InvalidArgumentError
from images.oci.reference import Reference, parse

DIGEST = "sha256:" + "0123456789abcdef" * 4

COMPONENT = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}", fullmatch=True)
DOMAIN = st.one_of(
    st.from_regex(r"[a-z0-9]{1,8}(\.[a-z]{2,6}){1,2}(:[0-9]{1,5})?", fullmatch=True),
    st.from_regex(r"[a-z]{1,8}:[0-9]{2,5}", fullmatch=True),
    st.sampled_from(["localhost", "localhost:5000", "[::1]:5000", "[2001:db8::1]", "127.0.0.1:5000"]),
)
TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
PATH = st.lists(COMPONENT, min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/user/app:x", "docker.io/user/app:x"),
        ("user/app", "docker.io/user/app:latest"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"busybox:1@{DIGEST}", f"docker.io/library/busybox:1@{DIGEST}"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("host:5000/a/b/c:v1", "host:5000/a/b/c:v1"),
        ("[::1]:5000/app:x", "[::1]:5000/app:x"),
        ("[2001:db8::1]/app", "[2001:db8::1]/app:latest"),
        ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
        ("Registry/app", "Registry/app:latest"),
        ("a__b/c--d", "docker.io/a__b/c--d:latest"),
    ],
)
def test_normal_forms(text: str, full: str) -> None:
    assert str(parse(text)) == full


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a valid name"),
        ("UPPER", "lower case"),
        ("a//b", "not a valid name"),
        ("a/../b", "not a valid name"),
        ("a b", "not a valid name"),
        ("a:", "not a valid tag"),
        ("a:-x", "not a valid tag"),
        ("a:" + "t" * 129, "not a valid tag"),
        ("a@sha256:123", "digest"),
        ("a@md5:" + "0" * 32, "digest"),
        ("a@", "digest"),
        ("https://docker.io/busybox", "scheme"),
        ("-x.example/app", "registry host"),
        ("host:port/app", "registry host"),
        ("[::1/app", "registry host"),
        ("/app", "not a valid name"),
        ("a_-b", "not a valid name"),
        ("x" * 300, "longer than 255"),
        ("0123456789abcdef" * 4, "image id"),
        ("bus\nybox", "not a valid name"),
        ("busybox\n", "not a valid name"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        parse(text)


@given(DOMAIN, PATH, TAG | st.just(""), st.sampled_from(["", DIGEST]))
def test_every_full_name_survives_a_round_trip(domain: str, path: str, tag: str, digest: str) -> None:
    text = f"{domain}/{path}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    reference = parse(text)
    assert (reference.domain, reference.path) == (domain, path)
    assert reference.digest == digest
    assert reference.tag == (tag or ("" if digest else "latest"))
    assert parse(str(reference)) == reference


@given(PATH, TAG)
def test_short_names_are_on_docker_hub_unless_they_name_a_host(path: str, tag: str) -> None:
    first, slash, _ = path.partition("/")
    if slash and ("." in first or first == "localhost"):
        path = "x" + path.replace(".", "").removeprefix("localhost")
    reference = parse(f"{path}:{tag}")
    assert reference == Reference("docker.io", path if slash else f"library/{path}", tag)
    assert parse(str(reference)) == reference


@given(st.text(max_size=60))
def test_anything_is_either_parsed_or_refused(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidArgumentError:
        return
    assert parse(str(reference)) == reference
    assert str(reference) == str(reference).strip()
