"""Exec, attach and port-forward streams: SPDY/3.1 and WebSocket servers for kubelet, kubectl and crictl."""

from cri.streaming.attach_socket import AttachSocket
from cri.streaming.backend import ExecProcess, StreamBackend, TerminalSize
from cri.streaming.limits import StreamLimits
from cri.streaming.process_io import ProcessIO, open_pipes
from cri.streaming.server import StreamingServer
from cri.streaming.tokens import AttachRequest, ExecRequest, PortForwardRequest

__all__ = [
    "AttachRequest",
    "AttachSocket",
    "ExecProcess",
    "ExecRequest",
    "PortForwardRequest",
    "ProcessIO",
    "StreamBackend",
    "StreamLimits",
    "StreamingServer",
    "TerminalSize",
    "open_pipes",
]
