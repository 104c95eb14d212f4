"""Which hosts are asked, with what, and how their demands are answered."""

from __future__ import annotations

import base64
import re
import ssl
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.streams.tls import TlsFiles
from host.errors import InvalidArgumentError, PermissionDeniedError
from images.oci.reference import parse
from images.options import ImageOptions
from images.registry.credentials import Credentials
from images.registry.hosts import RegistryHost, hosts_for, is_loopback
from images.registry.redirects import origin_of, target_of
from images.registry.tokens import Challenge, answer_directly, parse_challenges, read_token, token_request


def options(folder: Path, *insecure: str) -> ImageOptions:
    return ImageOptions(registry_config_dir=str(folder), insecure_registries=insecure)


def write(folder: Path, registry: str, text: str) -> None:
    (folder / registry).mkdir(parents=True)
    (folder / registry / "hosts.toml").write_text(text)


@pytest.mark.parametrize(
    ("domain", "base"),
    [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("quay.io", "https://quay.io/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("plain.example:80", "http://plain.example:80/v2"),
        ("other.example:81", "http://other.example:81/v2"),
    ],
)
def test_defaults(tmp_path: Path, domain: str, base: str) -> None:
    (host,) = hosts_for(domain, options(tmp_path, "plain.example", "other.example:81"))
    assert host.base == base
    assert not host.mirror


def test_mirrors_come_first_in_their_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        "docker.io",
        """
        [host."https://mirror.example"]
          capabilities = ["pull"]
          skip_verify = true
          dial_timeout = "1m30s"
          ca = "ca.pem"
          client = [["cert.pem", "key.pem"]]
          [host."https://mirror.example".header]
            x-one = "1"
            x-many = ["a", "b"]
        [host."http://cache.example:8080/prefix/v2"]
          override_path = true
        [host."http://second.example/sub"]
        """,
    )
    first, second, third, own = hosts_for("docker.io", options(tmp_path))
    assert first.base == "https://mirror.example/v2"
    assert first.mirror
    assert first.capabilities == {"pull"}
    assert first.connect_seconds == 90
    assert first.ca == (tmp_path / "docker.io/ca.pem",)
    assert first.client == ((tmp_path / "docker.io/cert.pem", tmp_path / "docker.io/key.pem"),)
    assert first.headers == (("x-one", "1"), ("x-many", "a"), ("x-many", "b"))
    assert second.base == "http://cache.example:8080/prefix/v2"
    assert third.base == "http://second.example/sub/v2"
    assert own.base == "https://registry-1.docker.io/v2"
    assert not own.mirror


def test_the_server_may_be_another_one_and_is_not_asked_twice(tmp_path: Path) -> None:
    write(tmp_path, "a.example", 'server = "http://b.example:5000"\nskip_verify = true')
    (own,) = hosts_for("a.example", options(tmp_path))
    assert own.base == "http://b.example:5000/v2"
    assert own.skip_verify
    write(tmp_path, "c.example", 'server = "https://m.example"\n[host."https://m.example"]\ncapabilities = ["pull"]')
    assert len(hosts_for("c.example", options(tmp_path))) == 1


def test_which_folder_counts(tmp_path: Path) -> None:
    write(tmp_path, "_default", 'server = "http://default.example"')
    assert hosts_for("any.example", options(tmp_path))[0].base == "http://default.example/v2"
    write(tmp_path, "reg.example:5000", 'server = "http://colon.example"')
    assert hosts_for("reg.example:5000", options(tmp_path))[0].base == "http://colon.example/v2"
    write(tmp_path, "reg.example_5000_", 'server = "http://underscore.example"')
    assert hosts_for("reg.example:5000", options(tmp_path))[0].base == "http://underscore.example/v2"


def test_certificates_in_docker_s_form(tmp_path: Path) -> None:
    folder = tmp_path / "reg.example"
    folder.mkdir()
    for name in ("ca.crt", "client.cert", "client.key"):
        (folder / name).write_text("")
    (host,) = hosts_for("reg.example", options(tmp_path))
    assert host.ca == (folder / "ca.crt",)
    assert host.client == ((folder / "client.cert", folder / "client.key"),)
    with pytest.raises(InvalidArgumentError, match=r"ca .*ca\.crt"):
        host.tls()


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "host = 1",
        "server = 1",
        'server = "ftp://x"',
        'capabilities = ["fly"]',
        "dial_timeout = 5",
        "ca = 1",
        "client = 1",
        'skip_verify = "false"',
        "skip_verify = 1",
        'override_path = "false"',
        "header = 1",
        'header = {"a b" = "x"}',
        'header = {a = "x\\r\\nHost: y"}',
        'server = "http://[::1"',
        'server = "http://a:99999"',
        'server = "http://:5000"',
        "x = " + "[" * 3000 + "]" * 3000,
        "# " + "x" * (1 << 20),
    ],
)
def test_mistakes_name_the_file(tmp_path: Path, text: str) -> None:
    write(tmp_path, "x.example", text)
    with pytest.raises(InvalidArgumentError, match=r"x\.example/hosts\.toml"):
        hosts_for("x.example", options(tmp_path))


def test_a_server_without_an_address_is_the_default(tmp_path: Path) -> None:
    write(tmp_path, "x.example", 'server = ""')
    (host,) = hosts_for("x.example", options(tmp_path))
    assert host.base == "https://x.example/v2"


@pytest.mark.parametrize(
    "domain", ["localhost:99999", "localhost:0", "a.example:65536", "[::1]:70000", "[:]", "[1.2.3.4]:5000", "[::1::2]"]
)
def test_a_registry_that_is_no_address_is_named(tmp_path: Path, domain: str) -> None:
    with pytest.raises(InvalidArgumentError, match=re.escape(f"registry '{domain}' is not an address")):
        hosts_for(parse(f"{domain}/app").domain, options(tmp_path))


def test_users_in_addresses_are_passed_over_as_containerd_does(tmp_path: Path) -> None:
    write(tmp_path, "x.example", '[host."https://user:secret@mirror.example:5000/v2"]\n')
    mirror, _ = hosts_for("x.example", options(tmp_path))
    assert mirror.base == "https://mirror.example:5000/v2"
    assert mirror.address == "mirror.example:5000"


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "localhost:1", "127.0.0.1", "127.9.9.9:80", "[::1]:5", "x.localhost")))
    assert not any(map(is_loopback, ("localhost.example", "128.0.0.1", "[2001:db8::1]:5000", "example")))


def test_challenges() -> None:
    header = 'Bearer realm="https://auth.example/token?a=1",service="reg, \\"x\\"",scope="repository:a/b:pull,push"'
    bearer, basic, other = parse_challenges([header + ', Basic realm="r"', "Negotiate"])
    assert bearer.scheme == "bearer"
    assert bearer.parameters["realm"] == "https://auth.example/token?a=1"
    assert bearer.parameters["service"] == 'reg, "x"'
    assert bearer.parameters["scope"] == "repository:a/b:pull,push"
    assert (basic.scheme, basic.parameters) == ("basic", {"realm": "r"})
    assert other.scheme == "negotiate"


BEARER = ("bearer", {"realm": "https://a/t"})


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ('Negotiate, Bearer realm="https://a/t"', [("negotiate", {}), BEARER]),
        ('Negotiate,Bearer realm="https://a/t",Basic', [("negotiate", {}), BEARER, ("basic", {})]),
        ("Basic, Bearer", [("basic", {}), ("bearer", {})]),
        (', ,bearer  REALM = "https://a/t" ,', [BEARER]),
        ('NTLM TlRM==, Bearer realm="https://a/t"', [("ntlm", {"tlrm": "="}), BEARER]),
        (
            'Digest realm="x", qop="auth, y=1", Bearer realm=https://a/t',
            [("digest", {"realm": "x", "qop": "auth, y=1"}), BEARER],
        ),
        ('Basic realm="a, Bearer realm=\\"x\\""', [("basic", {"realm": 'a, Bearer realm="x"'})]),
    ],
)
def test_several_challenges_in_one_header(header: str, found: list[tuple[str, dict[str, str]]]) -> None:
    assert [(one.scheme, one.parameters) for one in parse_challenges([header])] == found


def test_a_challenge_without_token_server_leaves_the_others() -> None:
    known = Credentials(username="u", password="p")
    for headers in (["Bearer", "Basic realm=x"], ["Basic, Bearer"], ['Bearer realm="", Basic']):
        assert answer_directly(parse_challenges(headers), known) == "Basic " + base64.b64encode(b"u:p").decode()
    challenges = parse_challenges(['Bearer error="x", Bearer realm="https://a.example/t", Basic'])
    assert answer_directly(challenges, known) is None
    assert token_request(challenges, known, "s", secure=True).url == "https://a.example/t?scope=s"


@given(st.text(max_size=80))
def test_any_header_is_survived(text: str) -> None:
    for challenge in parse_challenges([text]):
        assert challenge.scheme == challenge.scheme.lower()


def test_token_requests() -> None:
    challenges = parse_challenges(['Bearer realm="https://auth.example/token?x=1",service="s"'])
    request = token_request(challenges, None, "repository:a/b:pull", secure=True)
    assert request.url == "https://auth.example/token?x=1&scope=repository%3Aa%2Fb%3Apull&service=s"
    assert (request.headers, request.form) == ({}, None)
    known = Credentials(username="u", password="p")
    request = token_request(challenges, known, "repository:a/b:pull", secure=True)
    assert request.headers == {"Authorization": "Basic " + base64.b64encode(b"u:p").decode()}
    request = token_request(challenges, Credentials(identity_token="it"), "repository:a/b:pull", secure=True)
    assert request.form is not None
    assert request.form["refresh_token"] == "it"
    assert answer_directly(challenges, Credentials(registry_token="rt")) == "Bearer rt"
    assert answer_directly(parse_challenges(["Basic realm=x"]), known) is not None
    assert answer_directly(challenges, known) is None


def test_every_scope_and_what_the_realm_holds_are_asked_for() -> None:
    realm = "https://auth.example/token?account=&group=a&group=b&scope=mine"
    challenges = parse_challenges([f'Bearer realm="{realm}",scope="repository:a:pull repository:b:pull,push"'])
    request = token_request(challenges, None, "repository:a:pull", secure=True)
    assert parse_qsl(urlsplit(request.url).query, keep_blank_values=True) == [
        ("account", ""),
        ("group", "a"),
        ("group", "b"),
        ("scope", "repository:a:pull"),
        ("scope", "repository:b:pull,push"),
    ]


def test_credentials_are_not_sent_in_the_clear_where_the_registry_is_not() -> None:
    challenges = parse_challenges(['Bearer realm="http://auth.example/token"'])
    with pytest.raises(PermissionDeniedError, match="unencrypted"):
        token_request(challenges, Credentials(username="u"), "repository:a:pull", secure=True)
    assert token_request(challenges, None, "repository:a:pull", secure=True).headers == {}


def test_token_answers() -> None:
    assert read_token(b'{"token": "t"}') == "Bearer t"
    assert read_token(b'{"access_token": "a", "expires_in": 5}') == "Bearer a"
    nested = b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}"
    injected = (b'{"token": "a\\r\\nX: y"}', b'{"token": "\\u00fc"}', b'{"token": "%s"}' % (b"x" * 300_000))
    for content in (b"{}", b"no json", b'{"token": ""}', b'{"token": null}', b"\xff", nested, *injected):
        with pytest.raises(PermissionDeniedError, match="token server"):
            read_token(content)


def test_auth_is_read_as_docker_and_containerd_read_it() -> None:
    pair = base64.b64encode(b"user:" + b"p" * 100).decode()
    for broken in (pair + "\n", "\n".join((pair[:76], pair[76:])), "\r\n".join((pair[:40], pair[40:]))):
        assert Credentials(auth=broken).user_and_password() == ("user", "p" * 100)
    for content in (b"j\xfcrgen:gr\xfc\xdfe", b"\xff\xfe:x", "j\u00fcrgen:p".encode()):
        credentials = Credentials(auth=base64.b64encode(content).decode())
        assert credentials.basic() == "Basic " + base64.b64encode(content).decode(), "the bytes are sent as they are"
        credentials.described().encode()
    assert Credentials(auth=base64.b64encode(b"\0u:p\0\0").decode()).user_and_password() == ("\0u", "p")
    assert Credentials(username="a\nb").described() == "user a?b"


def test_addresses_of_redirects() -> None:
    base = "https://reg.example/v2/a?b"
    assert target_of(base, "/c?x=%7E%2f&y=a+b") == "https://reg.example/c?x=%7E%2f&y=a+b"
    assert target_of(base, "https://b.example/\u00fc x") == "https://b.example/%C3%BC%20x"
    assert target_of(base, "//c.example") == "https://c.example"
    wrong = (
        "",
        "ftp://x",
        "file:///etc/passwd",
        "http://",
        "http://[::1",
        "http://a:99999/",
        "https://a/" + "b" * 20_000,
    )
    for location in wrong:
        with pytest.raises(aiohttp.ClientPayloadError, match="no http address"):
            target_of(base, location)
    assert origin_of("https://a.example/x") == origin_of("https://A.example:443/y") != origin_of("http://a.example/x")


@pytest.mark.parametrize("realm", ["ftp://x", "http://[::1", "https://a:99999", "https://", "x", "https://[\udcff]"])
def test_token_servers_that_are_no_address_are_refused(realm: str) -> None:
    challenges = [Challenge("bearer", {"realm": realm})]
    with pytest.raises(PermissionDeniedError):
        token_request(challenges, Credentials(username="u"), "repository:a:pull", secure=False)


def test_the_registry_among_its_own_hosts_is_no_mirror(tmp_path: Path) -> None:
    write(tmp_path, "reg.example", '[host."https://mirror.example"]\n[host."https://reg.example"]\nskip_verify = true')
    mirror, own = hosts_for("reg.example", options(tmp_path))
    assert (mirror.mirror, own.mirror, own.skip_verify) == (True, False, True)
    write(tmp_path, "docker.io", '[host."https://registry-1.docker.io"]\n[host."http://docker.io"]')
    assert [host.mirror for host in hosts_for("docker.io", options(tmp_path))] == [False, False]
    write(tmp_path, "port.example", '[host."https://port.example:443"]\nskip_verify = true')
    (own,) = hosts_for("port.example", options(tmp_path))
    assert (own.mirror, own.skip_verify) == (False, True)
    write(
        tmp_path, "b.example", 'server = "https://up.example"\n[host."https://up.example"]\n[host."http://b.example"]'
    )
    assert [host.mirror for host in hosts_for("b.example", options(tmp_path))] == [False, False]


def test_credentials_in_all_forms() -> None:
    pair = base64.b64encode(b"user:pa:ss").decode()
    assert Credentials(auth=pair).user_and_password() == ("user", "pa:ss")
    assert Credentials(username="u", auth=pair).user_and_password() == ("u", "")
    assert Credentials().basic() is None
    assert Credentials(server_address="https://reg.example:5000/v1/").server_host() == "reg.example:5000"
    assert Credentials(server_address="reg.example").server_host() == "reg.example"
    assert "secret" not in repr(Credentials(username="u", password="secret", registry_token="secret"))
    for auth in ("%%%", "\u00fc", base64.b64encode(b"no colon").decode()):
        with pytest.raises(InvalidArgumentError, match="base64"):
            Credentials(auth=auth).user_and_password()


def test_authorities_without_key_usage_are_trusted_as_other_clients_do() -> None:
    """Python 3.13 would refuse them by default."""
    assert not RegistryHost("https://registry.test/v2").tls().verify_flags & ssl.VERIFY_X509_STRICT
    assert not TlsFiles().context().verify_flags & ssl.VERIFY_X509_STRICT
