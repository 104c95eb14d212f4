"""The agent's own validator: it refuses changes of plugins, and containers whose required plugins are missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from host.errors import InvalidArgumentError, UnavailableError
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.answers.owners import REMOVAL
from runtime.nri.options import ValidatorOptions

REQUIRED_PLUGINS = "required-plugins.noderesource.dev"
_ANNOTATION_LIMIT = 4096
_TRUE = ("1", "t", "T", "true", "True", "TRUE")

Field = nri_pb2.Field
_Profile = nri_pb2.SecurityProfile


def check(request: nri_pb2.ValidateContainerAdjustmentRequest, options: ValidatorOptions, subject: str) -> None:
    """Raise InvalidArgumentError for a change that ``options`` refuse, UnavailableError for a missing plugin.

    ``subject`` names the container in the message. Nothing is refused unless ``options.enabled``.
    """
    if not options.enabled:
        return
    owners = request.owners.owners.get(request.container.id, nri_pb2.FieldOwners())
    for field, refused in _refusals(request, options):
        names = _names(owners, field)
        if refused and names:
            raise InvalidArgumentError(
                f"{subject}: NRI plugin {names} changes {Field.Name(field)}, which nri.default_validator refuses"
            )
    _require_plugins(request, options, subject)


def _refusals(
    request: nri_pb2.ValidateContainerAdjustmentRequest, options: ValidatorOptions
) -> Iterable[tuple[nri_pb2.Field, bool]]:
    yield Field.OciHooks, options.reject_oci_hooks
    yield Field.Namespace, options.reject_namespaces
    yield Field.Sysctl, options.reject_sysctls
    profile = request.container.linux.seccomp_profile
    kind = profile.profile_type if request.container.linux.HasField("seccomp_profile") else _Profile.UNCONFINED
    refused = {
        _Profile.RUNTIME_DEFAULT: options.reject_runtime_default_seccomp,
        _Profile.UNCONFINED: options.reject_unconfined_seccomp,
        _Profile.LOCALHOST: options.reject_custom_seccomp,
    }
    yield Field.SeccompPolicy, refused.get(kind, False)


def _names(owners: nri_pb2.FieldOwners, field: nri_pb2.Field) -> str:
    names = [owners.simple[field]] if field in owners.simple else []
    if field in owners.compound:
        names += owners.compound[field].owners.values()
    return ", ".join(sorted({name.removeprefix(REMOVAL) for name in names}))


def _require_plugins(
    request: nri_pb2.ValidateContainerAdjustmentRequest, options: ValidatorOptions, subject: str
) -> None:
    annotations, name = request.pod.annotations, request.container.name
    tolerated = options.tolerate_missing_annotation
    if tolerated and _of_container(annotations, tolerated, name) in _TRUE:
        return
    there = {plugin.name for plugin in request.plugins}
    wanted = [*options.required_plugins, *_annotated(_of_container(annotations, REQUIRED_PLUGINS, name), subject)]
    if missing := [plugin for plugin in dict.fromkeys(wanted) if plugin not in there]:
        raise UnavailableError(
            f"{subject}: NRI plugins that it requires were not called for it: {', '.join(missing)}: check that they "
            "run and are connected"
        )


def _of_container(annotations: Mapping[str, str], key: str, container: str) -> str:
    """The value of an annotation for one container: the container's own, else the pod's."""
    for suffix in (f"/container.{container}", "/pod", ""):
        if key + suffix in annotations:
            return annotations[key + suffix]
    return ""


def _annotated(value: str, subject: str) -> list[str]:
    """The plugins that an annotation names as a YAML list."""
    names: object = None
    if not value:
        return []
    if len(value) <= _ANNOTATION_LIMIT:
        import yaml  # loaded at the start where it is needed, see ``Agent``

        with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):
            names = yaml.safe_load(value)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidArgumentError(
            f"{subject}: annotation {REQUIRED_PLUGINS} is not a list of plugin names of at most {_ANNOTATION_LIMIT} "
            'characters, as ["device-injector"]'
        )
    return names
