"""Calling services when answers get lost, as they do on a busy computer."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters
from std_srvs.srv import Trigger

from hardware.ros2.runtime import RosError
from hardware.ros2.services import SET_PARAMETERS, TRIGGER, ask, call, client, set_parameter


class Node:
    """Of its services, the first ``lost`` answers get lost; of rclpy as much as is asked.

    Attributes:
        created: Services that clients were made for.
        asked: Requests.
        waiting: Requests that an answer is still expected to.
    """

    def __init__(self, answer: Any, lost: int = 0) -> None:
        self.answer, self.lost = answer, lost
        self.created: list[str] = []
        self.asked: list[Any] = []
        self.waiting = 0

    def create_client(self, kind: Any, name: str) -> Any:
        self.created.append(name)
        return SimpleNamespace(service_is_ready=lambda: True, call_async=self._call, remove_pending_request=self._forget)

    def _call(self, request: Any) -> Any:
        self.asked.append(request)
        self.waiting += 1
        done = len(self.asked) > self.lost
        self.waiting -= done
        return SimpleNamespace(done=lambda: done, result=lambda: self.answer)

    def _forget(self, future: Any) -> None:
        self.waiting -= 1


SET = SetParameters.Response(results=[SetParametersResult(successful=True)])


def test_a_parameter_is_set_again_when_the_answer_gets_lost() -> None:
    node = Node(SET, lost=2)
    set_parameter(node, "arm", "seed", 5, timeout=0.2)
    assert [request.parameters[0].value.integer_value for request in node.asked] == [5, 5, 5]
    assert node.waiting == 0


def test_a_parameter_that_nobody_ever_sets_is_an_error() -> None:
    node = Node(SET, lost=9)
    with pytest.raises(RosError, match=r"'arm/set_parameters' did not answer within 0.2 s"):
        set_parameter(node, "arm", "seed", 5, timeout=0.2)
    assert len(node.asked) == 3
    assert node.waiting == 0


@pytest.mark.parametrize("verb", [ask, call])
def test_what_would_be_done_twice_is_asked_once(verb: Callable[..., Any]) -> None:
    """A reset that comes late would fall into the next episode."""
    node = Node(Trigger.Response(success=True), lost=1)
    with pytest.raises(RosError, match="did not answer"):
        verb(node, "arm/reset", TRIGGER, timeout=0.1)
    assert len(node.asked) == 1


def test_a_node_keeps_its_clients() -> None:
    """To a new one, which its server has not discovered yet, rmw_fastrtps may not answer."""
    node = Node(SET)
    client(node, "arm/set_parameters", SET_PARAMETERS)
    for seed in range(3):
        set_parameter(node, "arm", "seed", seed)
        set_parameter(node, "other", "seed", seed)
    assert node.created == ["arm/set_parameters", "other/set_parameters"]
    set_parameter(another := Node(SET), "arm", "seed", 1)
    assert another.created == ["arm/set_parameters"]
