"""The commands of images."""

from __future__ import annotations

import argparse

from cli.arguments.commands import Commands, client_options

IMAGE = "an image by tag, digest, id or unique prefix of an id"


def add_image_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``images``, ``pull`` and ``image``."""
    commands = Commands(subparsers, client_options())
    parser = commands.add("images", "images.images:list_images", "list images")
    parser.add_argument("--quiet", "-q", action="store_true", help="ids only")
    parser = commands.add("pull", "images.pulls:pull", "pull an image from its registry, and show the progress")
    parser.add_argument("reference", metavar="REF", help="such as registry.example/app:1.2 or busybox")
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="credentials for the registry")
    image = subparsers.add_parser(
        "image",
        help="work with images: import, export, push, tag, explain, verify, list, remove, prune",
        description="Work with images.",
    )
    below = Commands(image.add_subparsers(title="commands", metavar="COMMAND", required=True), client_options())
    parser = below.add("import", "images.images:import_archive", "import an OCI layout, OCI archive or docker archive")
    parser.add_argument("path", metavar="PATH", help="a folder or tar file on the node")
    parser.add_argument("--reference", metavar="REF", default="", help="name for images without a name in the archive")
    parser = below.add(
        "export",
        "images.archives:export",
        "write images to an OCI archive",
        "It needs their compressed layers (images.keep_blobs).",
    )
    parser.add_argument("path", metavar="FILE", help="archive to write on the node; an existing file is replaced")
    parser.add_argument("references", metavar="REF", nargs="+", help=IMAGE)
    parser = below.add("push", "images.archives:push", "push an image to a registry", "It needs its compressed layers.")
    parser.add_argument("reference", metavar="REF", help=IMAGE)
    parser.add_argument("destination", metavar="NAME", nargs="?", help="name in the registry (default: REF)")
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="credentials for the registry")
    parser = below.add(
        "from-checkpoint",
        "checkpoints.checkpoint:make_image",
        "make an image of a checkpoint archive",
        "It holds the container's memory, and so its secrets.",
    )
    parser.add_argument("archive", metavar="ARCHIVE", help="a file that podkeel checkpoint wrote, on the agent's node")
    parser.add_argument("name", metavar="NAME", help="name of the image")
    parser = below.add("tag", "images.archives:tag", "give an image one more name")
    parser.add_argument("reference", metavar="REF", help=IMAGE)
    parser.add_argument("name", metavar="NAME", help="such as registry.example/app:1.2")
    parser = below.add(
        "check",
        "images.reports:check",
        "compare the files of every image on disk with its digests",
        "Exits 1 if an image is broken and was not repaired.",
    )
    parser.add_argument("--repair", action="store_true", help="remove broken parts, so that they are pulled again")
    below.add("df", "images.reports:disk_usage", "show how much disk space images take, and how much they share")
    below.add("pulls", "images.pulls:list_pulls", "list the pulls that run now, of all clients")
    parser = below.add(
        "explain",
        "images.reports:explain",
        "ask every host that a pull would try; print the credentials used and the answer",
        "Nothing is pulled. Exits 1 if no host has the image.",
    )
    parser.add_argument("reference", metavar="REF", help="such as registry.example/app:1.2 or busybox")
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="credentials for the registry")
    parser = below.add(
        "verify",
        "images.reports:verify",
        "compare the signatures of an image in its registry with the node's policy",
        "Nothing is pulled. Exits 1 if the policy does not accept it.",
    )
    parser.add_argument("reference", metavar="REF", help="such as registry.example/app:1.2 or busybox")
    parser.add_argument("--creds", metavar="USER:PASSWORD", help="credentials for the registry")
    parser = below.add("ls", "images.images:list_images", "list images")
    parser.add_argument("--quiet", "-q", action="store_true", help="ids only")
    parser = below.add("rm", "images.images:remove", "remove images with all their names")
    parser.add_argument("references", metavar="REF", nargs="+", help=IMAGE)
    parser = below.add(
        "prune",
        "images.prune:prune",
        "remove images that no container uses and that have no tag",
        "Pinned images stay. kubelet pulls again what it needs.",
    )
    parser.add_argument("--all", "-a", action="store_true", help="also images with tags")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    parser.add_argument("--force", "-f", action="store_true", help="for users of docker: nothing is asked in any case")
    parser = below.add("inspect", "images.images:inspect", "print an image's status as JSON")
    parser.add_argument("reference", metavar="REF", help=IMAGE)
