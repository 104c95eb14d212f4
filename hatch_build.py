"""Build hook: generates the protocol stubs from the .proto files, in place, for wheels and editable installs alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        sources = sorted(str(path.relative_to(root)) for path in root.glob("proto/**/*.proto"))
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--pyi_out=.", *sources]
        subprocess.run(command, cwd=root, check=True)
        # An enum of NRI has a value None, which no Python file can declare.
        for stub in root.glob("proto/nri/**/*_pb2.pyi"):
            lines = stub.read_text().splitlines(keepends=True)
            stub.write_text("".join(line for line in lines if not line.lstrip().startswith("None: ")))
