"""Exec, attach and port-forward streams: SPDY/3.1 and WebSocket servers for kubelet, kubectl and crictl.

Nothing is imported here: the client of the command line needs the protocol machines alone.
"""
