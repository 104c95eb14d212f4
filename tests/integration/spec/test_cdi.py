"""A CDI device in a real container."""

from __future__ import annotations

import json
from pathlib import Path

from proto.runtime.v1 import cri_pb2
from tests.integration.spec.conftest import Run
from tests.unit.spec.requests import secured


def test_cdi_device(run: Run, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/driver").write_text("driver\n")
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ncat > {tmp_path}/hook-state\n")
    hook.chmod(0o755)
    edits = {
        "env": ["DEVICE=here"],
        "deviceNodes": [{"path": "/dev/vendor/log", "hostPath": "/dev/kmsg", "permissions": "w"}],
        "mounts": [{"hostPath": str(tmp_path / "lib"), "containerPath": "/opt/driver", "options": ["ro"]}],
        "hooks": [{"hookName": "createRuntime", "path": str(hook)}],
    }
    described = {
        "cdiVersion": "0.6.0",
        "kind": "vendor.com/log",
        "devices": [{"name": "kernel", "containerEdits": edits}],
    }
    folder = tmp_path / "cdi"
    folder.mkdir()
    (folder / "vendor.json").write_text(json.dumps(described))
    config = secured(run_as_user={"value": 1000})
    config.CDI_devices.append(cri_pb2.CDIDevice(name="vendor.com/log=kernel"))
    look = """
echo @env; echo $DEVICE
echo @lib; cat /opt/driver/driver; touch /opt/driver/x
echo @device; stat -c '%u %t:%T' /dev/vendor/log
echo @end"""
    result = run(look, config=config, cdi_folders=[folder])
    seen = result.sections()
    assert "end" in seen, result.output
    assert seen["env"] == "here"
    assert seen["lib"].startswith("driver\n")
    assert "Read-only" in seen["lib"]
    assert seen["device"] == "1000 1:b"
    assert json.loads((tmp_path / "hook-state").read_text())["id"].startswith("podkeel-test-spec-")
