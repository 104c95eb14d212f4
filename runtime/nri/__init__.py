"""The Node Resource Interface (NRI): plugins on the node that observe and adjust containers."""
