from __future__ import annotations

import json
import tomllib
from pathlib import Path

import msgspec
import pytest

from cli.main import main
from cri.config.configuration import Configuration, load
from host.errors import InvalidArgumentError


def write(folder: Path, text: str, name: str = "config.toml") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_defaults_where_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.config.configuration.DEFAULT_FILE", tmp_path / "config.toml")
    loaded = load()
    assert loaded.configuration == Configuration()
    assert set(loaded.origins.values()) == {"default"}


def test_later_sources_win_and_are_remembered(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[runtime]\ndata_dir = "/a"\nrun_dir = "/b"\npids_limit = 5\n[network]\nbridge = "file0"\nmtu = 1400\n',
    )
    write(tmp_path, '[network]\nbridge = "second0"\n[log]\nlevel = "debug"\n', "conf.d/20-more.toml")
    write(tmp_path, '\n[network]\nbridge = "first0"\npod_cidrs = ["10.1.0.0/16"]\n', "conf.d/10-first.toml")
    write(tmp_path, "not read", "conf.d/README")
    loaded = load(path, {"--data-dir": "/flag", "--bridge": None})
    configuration = loaded.configuration
    assert configuration.runtime.data_dir == "/flag"
    assert configuration.runtime.pids_limit == 5
    assert configuration.network.bridge == "second0"
    assert list(configuration.network.pod_cidrs) == ["10.1.0.0/16"]
    assert configuration.log.level == "debug"
    assert loaded.origins["runtime", "data_dir"] == "--data-dir"
    assert loaded.origins["runtime", "pids_limit"] == f"{path}:4"
    assert loaded.origins["network", "bridge"] == f"{tmp_path}/conf.d/20-more.toml:2"
    assert loaded.origins["network", "pod_cidrs"] == f"{tmp_path}/conf.d/10-first.toml:4"
    assert loaded.origins["log", "format"] == "default"


@pytest.mark.parametrize(
    ("flags", "socket", "origin"),
    [
        ({}, "unix:///b/podkeel.sock", "runtime.run_dir, {file}:2"),
        ({"--run-dir": "/c/"}, "unix:///c/podkeel.sock", "runtime.run_dir, --run-dir"),
        ({"--run-dir": "/c", "--socket": "unix:///d.sock"}, "unix:///d.sock", "--socket"),
    ],
)
def test_socket_follows_the_run_folder(tmp_path: Path, flags: dict[str, str], socket: str, origin: str) -> None:
    path = write(tmp_path, '[runtime]\nrun_dir = "/b"\n')
    loaded = load(path, flags)
    assert loaded.configuration.server.socket == socket
    assert loaded.origins["server", "socket"] == origin.format(file=path)


def test_a_handler_is_added_or_changed_and_the_others_stay(tmp_path: Path) -> None:
    text = '[runtime.handlers.kata]\npath = "/opt/kata"\n[runtime.handlers]\ncrun.arguments = ["--debug"]\n'
    loaded = load(write(tmp_path, text))
    handlers = loaded.configuration.runtime.handlers
    assert set(handlers) == {"crun", "runc", "kata"}
    assert handlers["kata"].path == "/opt/kata"
    assert (handlers["crun"].path, handlers["crun"].arguments) == ("crun", ("--debug",))
    assert loaded.origins["runtime", "handlers", "crun", "arguments"].endswith(":4")
    assert loaded.origins["runtime", "handlers", "kata", "root"] == "default"


def test_a_table_of_values_replaces_the_default(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, "[runtime]\ndefault_sysctls = {}\n"))
    assert loaded.configuration.runtime.default_sysctls == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n[runtim]\na = 1", ":2: runtim: unknown key; did you mean 'runtime'? allowed as a table: server, runtime, "),
        ("[network]\n\nbrigde = 'x'", ":3: network.brigde: unknown key; did you mean 'bridge'? allowed in [network]: "),
        ("log.lvl = 1", ":1: log.lvl: unknown key; "),
        ("[log]\nlevel = 'loud'", ':2: log.level: expected one of "debug", "error", "info", "warning", got "loud"'),
        ("[runtime]\npids_limit = 'x'", ':2: runtime.pids_limit: expected a whole number, got "x"'),
        ("[runtime]\npids_limit = true", ":2: runtime.pids_limit: expected a whole number, got true"),
        ("[network]\npod_cidrs = [\n'10.1.0.0/16',\n5]", ":2: network.pod_cidrs: expected a list, each "),
        ("server = 5", ":1: server: expected a table, got 5"),
        ("[server]\nsocket = '/run/x'", ":2: server.socket: expected a unix socket such as "),
        ("[runtime.handlers.x]\nroot = '/r'", ":1: runtime.handlers.x: path must be given"),
        ("[runtime.handlers]\nx = '/r'", ':2: runtime.handlers.x: expected a table, got "/r"'),
        (
            "[runtime.handlers.x]\npath = 'x'\nshim = 1",
            ":3: runtime.handlers.x.shim: unknown key; allowed in [runti",
        ),
        (
            "[runtime]\ndefault_runtime = 'kata'",
            ":2: runtime.default_runtime: no handler is named 'kata'; ",
        ),
        (
            "[runtime]\ndefault_sysctls = { a = 1 }",
            ":2: runtime.default_sysctls: expected a table, each value a",
        ),
        ("[network]\n\npod_cidrs = ['10.1.0.0/8']", ":3: network.pod_cidrs: expected address ranges such as "),
        ("[network]\nbridge = 'a-name-of-19-chars-'", ":2: network.bridge: expected a link name of 1 to 15 bytes "),
        (
            "[runtime]\ncgroup_driver = 'none'",
            ":2: runtime.cgroup_driver: expected one of auto, cgroupfs, systemd, got ",
        ),
        ("[runtime]\ndata_dir = 'here'", ":2: runtime.data_dir: expected an absolute path, got 'here'"),
        ("[network]\nmtu = -1", ":2: network.mtu: expected 0 or more, got -1"),
        ("a = 1\na = 2", ":2: not valid TOML: Cannot overwrite a value"),
        ("[log]\nlevel =", ":2: not valid TOML: Invalid value"),
        ("[log]\nlevel = '''x\n\n", ":2: not valid TOML: "),
    ],
)
def test_errors_name_file_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidArgumentError) as raised:
        load(path)
    assert raised.value.message.startswith(f"{path}{message}")
    assert "\n" not in raised.value.message


def test_an_error_in_a_flag_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r'^--metrics-address: metrics.address: expected .* got "nowhere"$'):
        load(write(tmp_path, ""), {"--metrics-address": "nowhere"})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"missing\.toml cannot be read: No such file"):
        load(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"')
    with pytest.raises(InvalidArgumentError, match=r"latin\.toml is not UTF-8"):
        load(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("address", "good"),
    [("127.0.0.1:0", True), ("[::1]:80", True), ("node.example:10350", True), ("::1:80", False), ("127.0.0.1", False)],
)
def test_listen_addresses(tmp_path: Path, address: str, good: bool) -> None:
    path = write(tmp_path, f'[streaming]\naddress = "{address}"\n')
    if good:
        assert load(path).configuration.streaming.address == address
    else:
        with pytest.raises(InvalidArgumentError):
            load(path)


def test_config_prints_toml_that_gives_the_same_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        '[runtime]\nrun_dir = "/a \\"b\\" é\\u007f"\n[runtime.handlers."my kata"]\npath = "kata"\narguments = ["-x"]\n'
    )
    path = write(tmp_path, text)
    assert (
        main(["config", "--config", str(path), "--pod-cidr", "10.1.0.0/16,10.2.0.0/16", "--pod-cidr", "fd00::/64"]) == 0
    )
    printed = capsys.readouterr().out
    assert f"# {path}:2\n" in printed
    assert "# --pod-cidr\n" in printed
    tomllib.loads(printed)
    again = load(write(tmp_path, printed, "again.toml")).configuration
    assert again.network.pod_cidrs == ("10.1.0.0/16", "10.2.0.0/16", "fd00::/64")
    assert again == load(path, {"--pod-cidr": list(again.network.pod_cidrs)}).configuration


def test_config_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, '[log]\nformat = "json"\n')
    assert main(["config", "--config", str(path), "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["origins"]["log.format"] == f"{path}:2"
    assert msgspec.convert(printed["values"], Configuration) == load(path).configuration


def test_a_configuration_error_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "[log]\nlevels = 'x'\n")
    for command in ("serve", "config", "check", "reset"):
        assert main([command, "--config", str(path)]) == 1
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert captured.err.startswith(f"podkeel: {path}:2: log.levels: unknown key")
