"""Commands with streams: exec, attach, port-forward."""
