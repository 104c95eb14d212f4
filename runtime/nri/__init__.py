"""The Node Resource Interface: plugins on the node that see and shape containers."""
