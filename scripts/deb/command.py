#!/usr/bin/python3 -IS
# -I and -S: Python's own modules and those below are used, regardless of what else is installed or in the environment.
"""The command podkeel of the Debian package, with the dependencies that the package carries for this Python."""

import os
import sys

PLACE = "/usr/lib/podkeel"
NAME = f"python{sys.version_info.major}.{sys.version_info.minor}"
if not os.access(f"{PLACE}/{NAME}", os.X_OK):  # pathlib takes long to import
    sys.exit(f"podkeel: /usr/bin/python3 is {NAME}, and this package has no {PLACE}/{NAME}: upgrade the package")
sys.path.append(f"{PLACE}/{NAME}")

from podkeel.cli.main import main  # type: ignore[import-not-found]  # noqa: E402  # found by the line above

sys.exit(main())
