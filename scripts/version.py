#!/usr/bin/env python3
"""The version of these sources: prints it, and is asked for it by every build (pyproject.toml).

It comes from the tags of git, `vX.Y.Z` or `vX.Y.ZrcN`:

* a commit with a tag has the version of the tag;
* N commits later it is `X.Y.Z+N.gCOMMIT`, a version of PEP 440 and of Semantic Versioning that is newer than X.Y.Z;
* `.dirty` follows if files of the commit are changed;
* without any tag X.Y.Z is 0.0.0, and without git the version is `0.0.0+unknown`; standard error says so.

Archives know their version: an sdist has it in PKG-INFO, an archive of `git archive` in this file.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "0.0.0+unknown"
ARCHIVED = "$Format:%(describe:tags,match=v[0-9]*)$"  # git archive fills it in: .gitattributes
_DESCRIPTION = re.compile(r"v(?P<tag>[0-9].*?)(?:-(?P<distance>[0-9]+)-(?P<commit>g[0-9a-f]+))?(?P<dirty>-dirty)?")


def find_version(root: Path = ROOT) -> str:
    """The version of the sources in ``root``."""
    package_info = root / "PKG-INFO"
    if package_info.is_file():
        return str(re.findall(r"^Version: (.+)$", package_info.read_text(), re.MULTILINE)[0])
    if (root / ".git").exists():
        return _version_of_repository(root)
    if "$" not in ARCHIVED and (match := _DESCRIPTION.fullmatch(ARCHIVED)):
        return _version_of(match)
    _say(f"there is no git repository in {root}: the version is {UNKNOWN}")
    return UNKNOWN


def _version_of_repository(root: Path) -> str:
    try:
        description = _git(root, "describe", "--tags", "--long", "--dirty", "--always", "--match", "v[0-9]*")
        match = _DESCRIPTION.fullmatch(description)
        if match is not None:
            return _version_of(match)
        # Only the commit: no tag was found.
        count, commit = _git(root, "rev-list", "--count", "HEAD"), description.removesuffix("-dirty")
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()
        _say(f"git cannot describe {root}: the version is {UNKNOWN}: {why}")
        return UNKNOWN
    version = f"0.0.0+{count}.g{commit}{'.dirty' if description.endswith('-dirty') else ''}"
    _say(f"{root} has no tag of a version (git fetch --tags may get one): the version is {version}")
    return version


def _version_of(description: re.Match[str]) -> str:
    dirty = ".dirty" if description["dirty"] else ""
    if description["distance"] in (None, "0"):
        return description["tag"] + (f"+0.{description['commit']}{dirty}" if dirty else "")
    return f"{description['tag']}+{description['distance']}.{description['commit']}{dirty}"


def _git(root: Path, *words: str) -> str:
    # The build runs the code of this checkout in any case, also if another user owns it.
    options = ("-C", str(root), "-c", f"safe.directory={root}", "-c", "core.fsmonitor=false")
    return subprocess.run(["git", *options, *words], check=True, capture_output=True, text=True).stdout.strip()


def _say(sentence: str) -> None:
    print(f"version: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    print(find_version())
