"""Which calls of an instance that left etcd are in vain."""

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from common.dynamo.instances import Directory, InstanceCall, InstanceFailed, Instances
from common.dynamo.runtime import Client, Context


class LeftEtcd:
    """A client whose only instance is not listed any more."""

    def __init__(self, *, is_lease_there: bool) -> None:
        self.generation = 1
        self.is_lease_there = is_lease_there
        self.num_asked = 0

    async def instance_ids(self) -> list[int]:
        return []

    async def is_lease_known(self, instance_id: int) -> bool:
        self.num_asked += 1
        return self.is_lease_there


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.dynamo.instances._LOOK_S", 0.005)
    monkeypatch.setattr("common.dynamo.instances.SILENCE_WITHOUT_LEASE_S", 0.02)
    monkeypatch.setattr("common.dynamo.instances.SILENCE_S", 1.0)


def why_given_up(client: LeftEtcd, then: Callable[[], None] = lambda: None) -> str:
    """Why a call of it ends that hears nothing; `then` happens right after its begin."""

    async def scenario() -> str:
        call = InstanceCall(Context(), client.generation)
        with Instances(cast("Client", client), cast("Directory", None)).calling(1, call):
            then()
            async with asyncio.timeout(5):
                with pytest.raises(InstanceFailed) as failure:
                    await call.open(asyncio.Future())
        return str(failure.value)

    return asyncio.run(scenario())


def test_one_whose_lease_has_ended_is_dead() -> None:
    assert why_given_up(LeftEtcd(is_lease_there=False)).startswith("its lease has ended")


def test_one_that_keeps_its_lease_is_finishing_its_work() -> None:
    client = LeftEtcd(is_lease_there=True)
    assert why_given_up(client).startswith("it left etcd")
    assert client.num_asked > 1


def test_where_etcd_has_forgotten_everybody_a_lease_tells_nothing() -> None:
    client = LeftEtcd(is_lease_there=False)

    def forget_us() -> None:
        client.generation += 1

    assert why_given_up(client, forget_us).startswith("it left etcd")
