"""What /proc says of processes."""

from __future__ import annotations

import os
import subprocess

from host.files.procfs import is_child_or_grandchild, parent_of


def test_children_and_grandchildren_are_found() -> None:
    with subprocess.Popen(["sh", "-c", "sh -c 'sleep 100 & echo $!; wait' & echo $!; wait"],
                          stdout=subprocess.PIPE, text=True) as top:  # fmt: skip
        assert top.stdout is not None
        child, grandchild = sorted(int(top.stdout.readline()) for _ in range(2))
        assert parent_of(grandchild) == child
        assert is_child_or_grandchild(child, top.pid)
        assert is_child_or_grandchild(grandchild, top.pid)
        assert not is_child_or_grandchild(grandchild, os.getpid())
        assert not is_child_or_grandchild(top.pid, top.pid)
        os.kill(child, 9)  # now the grandchild has another parent
        while parent_of(grandchild) == child:
            pass
        assert not is_child_or_grandchild(grandchild, top.pid)
        os.kill(grandchild, 9)
        top.terminate()
    assert not is_child_or_grandchild(grandchild, top.pid)
