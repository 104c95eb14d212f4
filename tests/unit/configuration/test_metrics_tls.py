"""Which TLS files of the metrics endpoint go together, and what is said of those that cannot be used."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cri.config.options import MetricsOptions
from cri.telemetry.monitoring import server_tls
from host.errors import InvalidArgumentError


def test_without_files_it_is_plain_http() -> None:
    assert server_tls(MetricsOptions()) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MetricsOptions(tls_certificate="c"), "tls_certificate and tls_key belong together"),
        (MetricsOptions(tls_key="k", tls_client_ca="a"), "tls_certificate and tls_key belong together"),
        (MetricsOptions(tls_client_ca="a"), "tls_client_ca is only of use with a certificate and a key"),
        (MetricsOptions(tls_certificate="/none", tls_key="/none"), "certificate /none with key /none cannot be used"),
    ],
)
def test_files_that_do_not_do(options: MetricsOptions, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"metrics: {message}"):
        server_tls(options)


def test_a_client_ca_that_holds_no_certificate(tmp_path: Path, own_certificate: MetricsOptions) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    options = MetricsOptions(
        tls_certificate=own_certificate.tls_certificate,
        tls_key=own_certificate.tls_key,
        tls_client_ca=str(tmp_path / "ca.pem"),
    )
    with pytest.raises(InvalidArgumentError, match=f"metrics: tls_client_ca {tmp_path}/ca.pem cannot be used"):
        server_tls(options)


@pytest.fixture
def own_certificate(tmp_path: Path) -> MetricsOptions:
    certificate, key = tmp_path / "own.pem", tmp_path / "own.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=t"]
    subprocess.run(command, check=True, capture_output=True)
    return MetricsOptions(tls_certificate=str(certificate), tls_key=str(key))
