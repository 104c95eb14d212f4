"""SIGKILL to the agent at random moments while clients make, run and remove pods."""

from __future__ import annotations

import random
import threading
import time

import grpc

from proto.runtime.v1 import cri_pb2
from tests.faults.conftest import Stage
from tests.support.agent import SOON
from tests.support.cri import CriClient
from tests.support.pods import container_config, remove_all_pods, sandbox_config

_KILLS = 8
_CLIENTS = 3


def test_killed_at_any_moment(stage: Stage) -> None:
    moments = random.Random(20260131)
    for _ in range(_KILLS):
        load = [threading.Thread(target=_create_and_remove_pods, args=(stage,)) for _ in range(_CLIENTS)]
        for client in load:
            client.start()
        time.sleep(moments.uniform(0.05, 0.7))
        stage.agent.kill()
        for client in load:
            client.join(timeout=SOON)
            assert not client.is_alive()
        stage.agent.start()
        stage.assert_whole()
        _assert_no_incomplete_object_is_listed(stage)
    remove_all_pods(stage.agent.client, keep=stage.bystander.sandbox_id)


def _create_and_remove_pods(stage: Stage) -> None:
    client = CriClient(stage.agent.address)
    try:
        while True:
            sandbox = sandbox_config(stage.agent)
            sandbox_id = client.run_sandbox(sandbox)
            container_id = client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
            client.start(container_id)
            client.output(container_id, "true")
            client.stop(container_id)
            client.remove(container_id)
            client.stop_sandbox(sandbox_id)
            client.remove_sandbox(sandbox_id)
    except grpc.RpcError as error:
        if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            raise
    finally:
        client.close()


def _assert_no_incomplete_object_is_listed(stage: Stage) -> None:
    for item in stage.agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers:
        status = stage.agent.client.status(item.id)
        assert status.state != cri_pb2.CONTAINER_UNKNOWN
        if status.state == cri_pb2.CONTAINER_EXITED:
            assert status.exit_code == 137
            assert status.finished_at >= status.started_at > 0
