"""Exec, attach and port-forward streams: SPDY/3.1 and WebSocket servers for kubelet, kubectl and crictl.

Nothing is imported here, since the command line uses the protocol machines only.
"""
