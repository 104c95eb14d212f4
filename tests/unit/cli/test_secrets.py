"""Credentials in a bundle for a bug report."""

from __future__ import annotations

import pytest

from cli.agent.secrets import without_secrets

SECRET = "hunter2-Secret"


@pytest.mark.parametrize(
    "text",
    [
        f"layer of https://user:{SECRET}@registry.test/v2/: refused",
        f"GET https://blobs.test/x?X-Amz-Date=1&X-Amz-Signature={SECRET}&x=1",
        f"https://blobs.test/x?sv=2020&sig={SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"authorization: Basic {SECRET}==",
        f'{{"auth": "{SECRET}"}}',
        f'{{"identity_token":"{SECRET}"}}',
        f'registry_password = "{SECRET} with \\" and spaces"',
        f"DB_PASSWORD='{SECRET}'",
        f'arguments = ["--token={SECRET}"]',
        f"crun: exec --password {SECRET} failed",
        f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIx{SECRET.replace('-', '')}.c2ln",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_credentials_are_hidden(text: str) -> None:
    shown = without_secrets(text)
    assert SECRET not in shown
    assert SECRET.replace("-", "") not in shown
    assert "[hidden]" in shown


@pytest.mark.parametrize(
    "text",
    [
        "images.pinned, images.credentials_file",
        "== threads: 14\n-- passes (1)",
        "cri/streaming/tokens.py:12 take",
        "unix:///run/podkeel/podkeel.sock",
        "docker.io/library/busybox@sha256:53058cf26b9471a71ecd77b267768ed481c2db26",
        "2026-12-01T04:00:00.000Z info    images: pulled (1.2 s)",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert without_secrets(text) == text
