"""The parser of the command line, and the commands that are not about images."""

from __future__ import annotations

import argparse

from cli.arguments.commands import Commands, client_options
from cli.arguments.images import add_image_commands

_POD = "a pod by name, namespace/name, id or unique prefix of an id"
_CONTAINER = "a container by name, id or unique prefix of an id"

IMAGE_COMMANDS = {name: name for name in ("import", "export", "push", "tag", "df", "pulls")} | {"rmi": "rm"}


def build_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets ``handler`` to ``module:function`` below ``cli``, imported when it is run."""
    parser = argparse.ArgumentParser(
        prog="podkeel",
        description="A Kubernetes node agent. `podkeel serve` runs it; most other commands are its clients.",
        epilog="`podkeel COMMAND --help` describes each command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version of this command and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_agent_commands(commands)
    _add_pod_commands(commands)
    _add_container_commands(commands)
    add_image_commands(commands)
    _add_node_commands(commands)
    return parser


class _Version(argparse.Action):
    """Looks for the version only if it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} {version('podkeel')}")
        parser.exit()


def _configuration_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group(
        "configuration", "Flags win over the file, and its conf.d/*.toml over it. docs/configuration.md has every key."
    )
    group.add_argument("--config", metavar="FILE", help="default: /etc/podkeel/config.toml, if it exists")
    group.add_argument(
        "--socket", metavar="URL", help="where the CRI is served (default: podkeel.sock in the run folder)"
    )
    group.add_argument("--data-dir", metavar="DIR", help="state, images, writable layers (default: /var/lib/podkeel)")
    group.add_argument("--run-dir", metavar="DIR", help="sockets and mounts, on a tmpfs (default: /run/podkeel)")
    group.add_argument(
        "--pod-cidr", metavar="CIDR", action="append", help="range of pod addresses; repeat it, or separate by commas"
    )
    group.add_argument("--bridge", metavar="NAME", help="bridge of the built-in network")
    group.add_argument("--registry-config-dir", metavar="DIR", help="configuration per registry, HOST/hosts.toml")
    group.add_argument(
        "--default-runtime",
        metavar="NAME",
        help="runtime handler of pods that name none (default: the first that works)",
    )
    group.add_argument("--stream-address", metavar="HOST:PORT", help="address of exec, attach and port-forward streams")
    group.add_argument(
        "--metrics-address", metavar="HOST:PORT", help="address of /metrics and /healthz (default: 127.0.0.1:10351)"
    )
    group.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error (default: info)")
    return parser


def _add_agent_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    commands = Commands(subparsers, _configuration_options())
    parser = commands.add(
        "serve", "agent.serve:serve", "run the agent until SIGTERM or Ctrl-C", "Containers outlive it."
    )
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="if the store is missing, empty or damaged, start from its copy and the run folder",
    )
    parser = commands.add(
        "serve-images",
        "agent.serve_images:serve_images",
        "serve the images of this node to other nodes, as a mirror of their registries",
        "It runs beside the agent until SIGTERM. Other nodes name it in hosts.toml (docs/images.md).",
    )
    parser.add_argument("--listen", metavar="HOST:PORT", required=True, help="address to listen on")
    parser.add_argument("--token-file", metavar="FILE", default="", help="tokens of clients, one a line")
    parser.add_argument("--anonymous", action="store_true", help="no token is needed: everybody gets every image")
    parser.add_argument("--pull", action="store_true", help="have the agent pull images that are missing")
    group = parser.add_argument_group("TLS", "PEM files; with the first two, images are served over HTTPS.")
    group.add_argument("--tls-cert", metavar="FILE", default="", help="certificate of this node")
    group.add_argument("--tls-key", metavar="FILE", default="", help="its key")
    group.add_argument("--tls-client-ca", metavar="FILE", default="", help="clients need a certificate signed by it")
    parser = commands.add("config", "agent.config:config", "print every effective value and its source")
    parser.add_argument("--format", choices=("toml", "json"), default="toml", help="output format (default: toml)")
    parser = commands.add(
        "check",
        "agent.check:check",
        "say what on this host works and what is missing, with the remedy",
        "An agent that runs here is asked to compare its store with the kernel. Exits 1 if anything fails.",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="output format (default: table)")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="have the agent remove objects that belong to no pod and restore missing ones",
    )
    parser = commands.add(
        "reset",
        "agent.reset:reset",
        "take down everything an agent of this configuration left on the host",
        "Containers, mounts, namespaces, links, addresses and its folders. The agent must not be running.",
    )
    parser.add_argument("--yes", action="store_true", help="confirm the removal")
    parser.add_argument("--force", action="store_true", help="continue if CNI plugins do not release a network")


def _add_pod_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    commands = Commands(subparsers, client_options())
    parser = commands.add(
        "run",
        "run:run",
        "run the pod of a Kubernetes manifest",
        "Prints a warning for each field that it does not support.",
    )
    parser.add_argument("file", metavar="FILE", help="YAML with one Pod; - reads standard input")
    parser.add_argument("--quiet", "-q", action="store_true", help="print the pod's id only")
    parser.add_argument("--runtime-handler", metavar="NAME", default=None, help="run it with this runtime handler")
    _add_pod_dir(parser)
    parser = commands.add("rm", "pods:remove", "stop and remove pods")
    parser.add_argument("pods", metavar="POD", nargs="+", help=_POD)
    parser.add_argument(
        "--force", "-f", action="store_true", help="remove a pod even if CNI plugins cannot release its network"
    )
    _add_pod_dir(parser)
    parser = commands.add("pods", "pods:list_pods", "list pods")
    parser.add_argument("--quiet", "-q", action="store_true", help="full ids only")
    parser = commands.add("stop", "pods:stop", "stop containers, or pods with all that is in them")
    parser.add_argument("objects", metavar="CONTAINER|POD", nargs="+", help="by name, id or unique prefix of an id")
    parser.add_argument(
        "--timeout", "-t", type=int, default=10, metavar="S", help="seconds before SIGKILL (default: 10)"
    )
    parser = commands.add("start", "pods:start", "start containers that were created")
    parser.add_argument("containers", metavar="CONTAINER", nargs="+", help=_CONTAINER)
    parser = commands.add("inspect", "pods:inspect", "print the full status of a pod, container or image as JSON")
    parser.add_argument("object", metavar="ID", help="by name, id or unique prefix of an id")
    parser = commands.add("explain", "explain:explain", "show the stages a pod or container went through")
    parser.add_argument("object", metavar="POD", help="a pod or container by name, id or unique prefix of an id")
    commands.add("nri", "plugins:nri", "list the NRI plugins of the node: state, events, calls and last error")


def _add_pod_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pod-dir",
        metavar="DIR",
        default="/var/lib/podkeel-pods",
        help="parent of the folders of logs and emptyDirs, one per pod (default: /var/lib/podkeel-pods)",
    )


def _add_container_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    commands = Commands(subparsers, client_options())
    parser = commands.add("ps", "pods:list_containers", "list running containers")
    parser.add_argument("--all", "-a", action="store_true", help="also list containers that do not run")
    parser.add_argument("--quiet", "-q", action="store_true", help="full ids only")
    parser.add_argument("--pod", metavar="POD", help=f"only containers of this pod: {_POD}")
    parser = commands.add("logs", "logs:logs", "print a container's log")
    parser.add_argument("container", metavar="CONTAINER", help=_CONTAINER)
    parser.add_argument("--follow", "-f", action="store_true", help="continue until the container ends")
    parser.add_argument("--tail", type=int, metavar="N", help="begin with the last N lines")
    parser.add_argument("--timestamps", action="store_true", help="begin each line with its time")
    parser = commands.add(
        "exec",
        "streams.exec:execute",
        "run a command in a container",
        "Prints its output as it arrives, and ends with its exit code. The command ends when podkeel does.",
    )
    _add_stream_options(parser)
    parser.add_argument(
        "--timeout", type=int, default=0, metavar="S", help="kill the command after S seconds (default: never)"
    )
    parser.add_argument("container", metavar="CONTAINER", help=_CONTAINER)
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command and its arguments")
    parser = commands.add(
        "attach",
        "streams.exec:attach",
        "show what a container prints from now on, and send it input",
        "The container continues when podkeel ends.",
    )
    _add_stream_options(parser)
    parser.add_argument("container", metavar="CONTAINER", help=_CONTAINER)
    parser = commands.add(
        "port-forward",
        "streams.port_forward:port_forward",
        "carry connections from local ports into a pod, until Ctrl-C",
        "Inside the pod, connections come from its own localhost.",
    )
    parser.add_argument(
        "--address", default="localhost", metavar="HOST", help="address to listen on (default: localhost)"
    )
    parser.add_argument("pod", metavar="POD", help=_POD)
    parser.add_argument(
        "ports",
        metavar="[LOCAL:]REMOTE",
        nargs="+",
        help="8080:80; 80 for the same port on both sides; :80 for a free local port",
    )
    _add_tls_options(parser)
    parser = commands.add(
        "checkpoint",
        "checkpoints.checkpoint:checkpoint",
        "write a running container to an archive; the container continues",
        "The archive holds the container's memory, and so its secrets.",
    )
    parser.add_argument("--timeout", type=int, default=0, metavar="S", help="give up after S seconds (default: never)")
    parser.add_argument("container", metavar="CONTAINER", help=_CONTAINER)
    parser.add_argument("archive", metavar="ARCHIVE", help="the file to write, on the agent's node")
    parser = commands.add(
        "checkpoint-pod",
        "checkpoints.pod:checkpoint_pod",
        "write all running containers of a pod to a folder, at the same moment; they run on",
        "The folder holds the memory of the containers, and so their secrets.",
    )
    parser.add_argument("--timeout", type=int, default=0, metavar="S", help="give up after S seconds (default: never)")
    parser.add_argument(
        "--leave-out-sessions", action="store_true", help="also while clients are attached or ports are forwarded"
    )
    parser.add_argument("pod", metavar="POD", help=_POD)
    parser.add_argument("folder", metavar="FOLDER", help="an empty folder on the agent's node; made if it is missing")
    parser = commands.add(
        "restore",
        "checkpoints.checkpoint:restore",
        "make and start a container from a checkpoint archive, in a pod that exists",
        "Its processes continue where the checkpoint was made. The image made from the archive is kept.",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the container (default: its name in the checkpoint)")
    _add_restore_options(parser, "HOST:CONTAINER[:ro]")
    parser.add_argument("archive", metavar="ARCHIVE", help="a file that podkeel checkpoint wrote, on the agent's node")
    parser.add_argument("pod", metavar="POD", help=_POD)
    parser = commands.add(
        "restore-pod",
        "checkpoints.restore_pod:restore_pod",
        "make a pod from a checkpoint of podkeel checkpoint-pod, and start its containers",
        "Their processes continue where the checkpoint was made. The folder is not changed.",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the pod (default: its name in the checkpoint)")
    _add_restore_options(parser, "[NAME=]HOST:CONTAINER[:ro]")
    parser.add_argument("--runtime-handler", metavar="NAME", help="a handler other than that of the checkpoint")
    _add_pod_dir(parser)
    parser.add_argument("folder", metavar="FOLDER", help="a folder that podkeel checkpoint-pod wrote, on this node")
    parser = commands.add("stats", "stats:stats", "show what containers use of CPU, memory and disk")
    parser.add_argument("containers", metavar="CONTAINER", nargs="*", help=f"{_CONTAINER} (default: all that run)")


def _add_restore_options(parser: argparse.ArgumentParser, form: str) -> None:
    volume = "a path of the node for a mount that was saved, of the container NAME if it is given; may be repeated"
    parser.add_argument("--volume", metavar=form, action="append", default=[], help=volume)
    unmasked = "do not mask /proc: for a container whose /proc was not masked when it was checkpointed"
    parser.add_argument("--unmasked", action="store_true", help=unmasked)


def _add_stream_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stdin", "-i", action="store_true", help="pass podkeel's standard input to the process")
    parser.add_argument(
        "--tty", "-t", action="store_true", help="give the process a terminal, shown on the terminal of podkeel"
    )
    parser.add_argument(
        "--detach-keys",
        metavar="KEYS",
        default="ctrl-p,ctrl-q",
        help='keys that end podkeel when typed with -it, such as ctrl-],q; "" for none (default: ctrl-p,ctrl-q)',
    )
    _add_tls_options(parser)


def _add_tls_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TLS", "PEM files for an agent whose streams are served over HTTPS.")
    group.add_argument("--tls-ca", metavar="FILE", help="certificate authorities to trust (default: those of the host)")
    group.add_argument("--tls-cert", metavar="FILE", help="client certificate, if the agent asks for one")
    group.add_argument("--tls-key", metavar="FILE", help="key of the client certificate (default: in the same file)")


def _add_node_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    commands = Commands(subparsers, client_options())
    commands.add("version", "node:version", "print the versions of this command and of the agent")
    commands.add("info", "node:info", "print the agent's status: conditions, runtime handlers, configuration")
    parser = commands.add("events", "node:events", "print events of pods and containers as they occur")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="output format (default: text)")
    commands.add(
        "reload",
        "node:reload",
        "have the agent read its configuration again",
        "Prints what changed, and what needs a restart. A wrong file changes nothing. SIGHUP does the same.",
    )
    parser = commands.add(
        "debug",
        "debug:debug",
        "print what the agent is doing: stacks, open stages, pools, descriptors",
        "If its event loop hangs, it gets SIGQUIT, and writes the same to its log.",
    )
    below = Commands(parser.add_subparsers(title="commands", metavar="COMMAND"), client_options())
    parser = below.add(
        "bundle",
        "debug:bundle",
        "write what a bug report needs to an archive",
        "The archive holds no environment of a container, and credentials are replaced. Read it before you send it.",
    )
    parser.add_argument("file", metavar="FILE", help="such as podkeel.tar.gz; it must not exist")
