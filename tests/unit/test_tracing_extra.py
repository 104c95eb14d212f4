"""OpenTelemetry is an extra: nothing of it is imported unless traces are configured, and its lack is said plainly."""

from __future__ import annotations

import subprocess
import sys


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_agent_s_modules_do_not_import_it() -> None:
    done = run_python(
        "import sys, cli.main, cri.server, cri.telemetry.monitoring, runtime.agent\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_an_endpoint_without_the_extra_says_what_to_install() -> None:
    done = run_python(
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from host.errors import InvalidArgumentError\n"
        "try:\n    import cri.telemetry.tracing\n"
        "except InvalidArgumentError as error:\n    print(error.message)"
    )
    assert "pip install 'podkeel[otel]'" in done.stdout, done.stderr
