"""Every enum of every request, with a number without a name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cri.enums import require_known
from host.errors import InvalidArgumentError
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2

Path = tuple[Any, ...]  # of FieldDescriptor


def requests() -> Iterator[Descriptor]:
    for file in (cri_pb2.DESCRIPTOR, agent_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            yield from (method.input_type for method in service.methods)


def enums(message: Descriptor, seen: Path = ()) -> Iterator[Path]:
    """The way to every enum field below a kind of message."""
    for field in message.fields:
        if field.enum_type is not None:
            yield (*seen, field)
        elif field.message_type is not None and field.message_type not in [step.message_type for step in seen]:
            yield from enums(field.message_type, (*seen, field))


ALL = {
    f"{request.name}.{'.'.join(field.name for field in path)}": (request, path)
    for request in requests()
    for path in enums(request)
}


def holding(request: Descriptor, path: Path, number: int) -> tuple[Message, str]:
    """A request with that number in the field, and the field's name in errors."""
    message = GetMessageClass(request)()
    inner, names = message, []
    for field in path[:-1]:
        assert not field.message_type.GetOptions().map_entry
        value = getattr(inner, field.name)
        names.append(field.name + ("[0]" if field.is_repeated else ""))
        if field.is_repeated:
            inner = value.add()
        else:
            value.SetInParent()
            inner = value
    setattr(inner, path[-1].name, number)
    return message, ".".join([*names, path[-1].name])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("number", [99, -1, 2**31 - 1])
def test_a_number_without_a_name_is_refused_by_its_field(name: str, number: int) -> None:
    request, path = ALL[name]
    message, field = holding(request, path, number)
    with pytest.raises(InvalidArgumentError) as refused:
        require_known(message)
    assert f"{field}: {number} is not a {path[-1].enum_type.name}: use one of " in refused.value.message


@pytest.mark.parametrize("name", ALL)
def test_every_number_with_a_name_passes(name: str) -> None:
    request, path = ALL[name]
    for number in path[-1].enum_type.values_by_number:
        require_known(holding(request, path, number)[0])


def test_there_are_such_fields_in_all_that_clients_configure() -> None:
    kinds = {path[-1].enum_type.name for _, path in ALL.values()}
    assert kinds >= {"NamespaceMode", "MountPropagation", "Protocol", "Signal", "SupplementalGroupsPolicy"}
    assert kinds >= {"ProfileType", "ContainerState", "PodSandboxState"}
