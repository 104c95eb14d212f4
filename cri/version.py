"""The name and version of Podkeel."""

from __future__ import annotations

from importlib.metadata import version

RUNTIME_NAME = "podkeel"
VERSION = version("podkeel")  # an editable installation keeps the one that it was made with
API_VERSION = "v1"
KUBELET_API_VERSION = "0.1.0"
