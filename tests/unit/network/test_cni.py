from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from host.errors import InvalidArgumentError, PodkeelError
from network.cni.configuration import Configuration, parse, search_folder
from network.cni.record import CniRecord, CniState
from network.cni.result import decode, pod_interface
from network.options import NetworkOptions

_MANIFESTS = Path(__file__).parents[3] / "manifests" / "networks"
_PATH = Path("/etc/cni/net.d/10-net.conflist")


def _parse(**fields: Any) -> Configuration:
    content = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}], **fields}
    return parse(json.dumps(content).encode(), _PATH)


def test_a_list() -> None:
    found = _parse(
        plugins=[{"type": "bridge", "mtu": 1400}, {"type": "portmap", "capabilities": {"portMappings": True}}]
    )
    assert (found.name, found.version, found.path) == ("net", "1.0.0", str(_PATH))
    assert [plugin.type for plugin in found.plugins] == ["bridge", "portmap"]
    assert found.plugins[0].settings == {"type": "bridge", "mtu": 1400}
    assert found.capabilities == {"portMappings"}
    assert not found.disable_check


def test_a_single_plugin_is_a_list_of_one() -> None:
    found = parse(b'{"cniVersion": "0.3.1", "name": "net", "type": "ptp"}', Path("a.conf"))
    assert [plugin.type for plugin in found.plugins] == ["ptp"]


def test_the_best_allowed_version_comes_first() -> None:
    found = _parse(cniVersion="0.4.0", cniVersions=["0.3.1", "1.1.0", "2.0.0", "0.4.0"])
    assert found.versions == ("1.1.0", "0.4.0", "0.3.1")
    assert found.supports("0.4.0")
    assert not _parse(cniVersion="0.3.1").supports("0.4.0")


def test_the_one_version_counts_beside_the_list() -> None:
    assert _parse(cniVersion="1.1.0", cniVersions=["0.4.0", "1.0.0"]).versions == ("1.1.0", "1.0.0", "0.4.0")
    assert _parse(cniVersion="9.0.0", cniVersions=["0.4.0"]).versions == ("0.4.0",)


def _with_folder(tmp_path: Path, files: dict[str, str], **fields: Any) -> Configuration:
    folder = tmp_path / "net"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    content = {"cniVersion": "1.1.0", "name": "net", **fields}
    return parse(json.dumps(content).encode(), tmp_path / "10-net.conflist")


_TWO_FILES = {"20-b.conf": '{"type": "b"}', "10-a.conf": '{"type": "a", "own": 1}', "notes.json": "{"}


def test_plugins_from_the_folder_of_the_network_follow_those_of_the_file(tmp_path: Path) -> None:
    found = _with_folder(tmp_path, _TWO_FILES, plugins=[{"type": "bridge"}])
    assert [plugin.type for plugin in found.plugins] == ["bridge", "a", "b"]
    assert found.plugins[1].settings == {"type": "a", "own": 1}
    assert found.plugin_folder == tmp_path / "net"


def test_all_plugins_may_come_from_the_folder(tmp_path: Path) -> None:
    assert [plugin.type for plugin in _with_folder(tmp_path, _TWO_FILES).plugins] == ["a", "b"]


def test_the_folder_is_left_alone_where_the_file_says_so(tmp_path: Path) -> None:
    found = _with_folder(tmp_path, _TWO_FILES, plugins=[{"type": "bridge"}], loadOnlyInlinedPlugins=True)
    assert [plugin.type for plugin in found.plugins] == ["bridge"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "x"}', '{"type": "../x"}'])
def test_a_wrong_plugin_in_the_folder_makes_the_network_wrong(tmp_path: Path, content: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"its plugin .*/net/10-a\.conf"):
        _with_folder(tmp_path, {"10-a.conf": content}, plugins=[{"type": "bridge"}])


@pytest.mark.parametrize("only_inlined", [True, False])
def test_no_plugin_at_all_is_wrong(tmp_path: Path, only_inlined: bool) -> None:
    with pytest.raises(InvalidArgumentError, match="at least one plugin"):
        _with_folder(tmp_path, {}, loadOnlyInlinedPlugins=only_inlined)


@pytest.mark.parametrize("value", [True, "true", "True"])
def test_flags_may_be_words(value: object) -> None:
    assert _parse(disableCheck=value, disableGC=value).disable_gc


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": None}, "name None is no network name"),
        ({"name": "a/b"}, "is no network name"),
        ({"plugins": []}, "at least one plugin"),
        ({"plugins": {"type": "bridge"}}, "must be a list"),
        ({"plugins": ["bridge"]}, "is not an object"),
        ({"plugins": [{}]}, "plugin type None"),
        ({"plugins": [{"type": "../bridge"}]}, "plugin type '../bridge' is no program's name"),
        ({"plugins": [{"type": "bridge", "capabilities": ["dns"]}]}, "capabilities of plugin bridge"),
        ({"cniVersion": "0.2.0"}, "asks for CNI 0.2.0; supported are 0.3.0 to 1.1.0"),
        ({"cniVersion": 1}, "asks for CNI 1"),
        ({"cniVersions": "1.0.0"}, "cniVersions must be a list"),
        ({"disableCheck": "maybe"}, "disableCheck must be true or false"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        _parse(**fields)
    assert str(_PATH) in caught.value.message
    assert complaint in caught.value.message


@settings(max_examples=60)
@given(
    st.binary() | st.recursive(st.none() | st.booleans() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_any_other_content_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        parse(content, _PATH)


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["cniVersion", "cniVersions", "name", "plugins", "type", "disableCheck", "capabilities"]),
        st.recursive(
            st.none() | st.integers() | st.sampled_from(["1.0.0", "bridge", "net", "true"]),
            lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["type", "capabilities"]), inner),
        ),
    )
)
def test_odd_values_are_refused_by_path(content: dict[str, Any]) -> None:
    try:
        parse(json.dumps(content).encode(), _PATH)
    except InvalidArgumentError as error:
        assert str(_PATH) in error.message


def test_the_first_usable_name_in_a_folder(tmp_path: Path) -> None:
    assert search_folder(tmp_path / "absent") == (None, ())
    assert search_folder(tmp_path) == (None, ())
    (tmp_path / "30-a.conflist").write_text('{"cniVersion": "1.0.0", "name": "last", "type": "x"}')
    (tmp_path / "20-b.json").write_text('{"cniVersion": "1.0.0", "name": "first", "type": "x"}')
    (tmp_path / "10-c.conflist.bak").write_text("{")
    (tmp_path / "11-empty.conf").write_text("\n")
    (tmp_path / "12-folder.conf").mkdir()
    found, broken = search_folder(tmp_path)
    assert broken == ()
    assert found is not None
    assert found.name == "first"


def test_a_result_of_either_form() -> None:
    new = {
        "interfaces": [{"name": "veth12"}, {"name": "eth0", "mac": "aa:bb", "sandbox": "/x", "mtu": 1400}],
        "ips": [
            {"address": "10.1.0.1/24", "interface": 0},
            {"address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 1},
            {"address": "fd00::5/64", "gateway": "fd00::1", "interface": 1},
        ],
    }
    found = pod_interface("net", new)
    assert found.addresses == ("10.1.0.5", "fd00::5")
    assert found.networks == ("10.1.0.0/24", "fd00::/64")
    assert found.gateways == ("10.1.0.1", "fd00::1")
    assert (found.mac, found.mtu, found.host_interface) == ("aa:bb", 1400, "veth12")
    old = pod_interface("net", {"cniVersion": "0.3.1", "ips": [{"version": "4", "address": "10.1.0.5/32"}]})
    assert old == (("10.1.0.5",), ("10.1.0.5/32",), (), "", 0, "")


@settings(max_examples=60)
@given(st.binary())
def test_output_that_is_no_result(output: bytes) -> None:
    assume(not output.lstrip().startswith(b"{"))
    with pytest.raises(PodkeelError, match="CNI plugin bridge, ADD: printed"):
        decode("bridge", output)


def test_a_record_survives_the_store() -> None:
    record = CniRecord(
        sandbox_id="a",
        netns_path="/ns",
        arguments="",
        configuration=_parse(plugins=[{"type": "x", "deep": {"list": [1, None, "ö"]}}]),
        capabilities={"dns": {"servers": ["1.1.1.1"]}},
        state=CniState.DELETING,
        result={"ips": []},
    )
    assert msgspec.json.decode(msgspec.json.encode(record), type=CniRecord) == record


@pytest.mark.parametrize("path", sorted(_MANIFESTS.glob("*/*.conflist")), ids=lambda path: path.name)
def test_the_examples_are_read(path: Path) -> None:
    assert parse(path.read_bytes(), path).name


def test_the_example_of_options_is_read() -> None:
    table = tomllib.loads((_MANIFESTS / "podkeel.toml").read_text())["network"]
    assert msgspec.convert(table, NetworkOptions).mode == "cni"
