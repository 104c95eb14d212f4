"""Confinement in config.json: seccomp, AppArmor, SELinux, masked paths."""
