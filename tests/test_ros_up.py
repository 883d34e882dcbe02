"""`robopolicy up`: what it starts, in which order, what it does when something dies, is interrupted, or is killed itself."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rig import save_policy
from ros import Process, Sandbox
from std_srvs.srv import Trigger

from hardware.ros2 import up
from hardware.ros2.supervisor import HALTS, Supervisor
from hardware.ros2.system import SystemFileError, load_system
from robopolicy import cli

# Stand-ins for an arm's driver and a policy's lifecycle node; every line says when it was.
ARM = """
import rclpy, signal, sys
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import JointState
rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
node = rclpy.create_node("stand_in_arm")
print("domain of args", sys.argv[1:], flush=True)
publisher = node.create_publisher(JointState, "joint_states", 1)
told = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: told.append(True))
node.declare_parameter("life", 1e9)
node.create_timer(node.get_parameter("life").value, lambda: sys.exit(7))
while not told:
    rclpy.spin_once(node, timeout_sec=0.05)
print("arm has stopped", flush=True)
node.destroy_node(); rclpy.shutdown()
"""
POLICY = """
import json, rclpy, signal, threading, time
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import MultiThreadedExecutor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String
from std_srvs.srv import Trigger
class Policy(LifecycleNode):
    def __init__(self):
        super().__init__("stand_in_policy")
        self.declare_parameter("bad", False)
        self.declare_parameter("slow", False)
        self.declare_parameter("autostart", False)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.state = self.create_publisher(String, "~/state", latched)
        self.armed = self.get_parameter("autostart").value
        if self.armed:
            self.timer = self.create_timer(0.1, self.by_itself)
        self.stopped = threading.Event()
        self.group = ReentrantCallbackGroup()
        for name in ("start", "stop", "home", "estop", "reset"):
            self.create_service(Trigger, f"~/{name}", lambda _, answer, name=name: self.told(name, answer),
                                callback_group=self.group)
    def by_itself(self):
        self.timer.cancel()
        for step in (self.trigger_configure, self.trigger_activate):
            if self.armed and step() != TransitionCallbackReturn.SUCCESS:
                self.off("configure refused: bad")
        if self.armed:
            print("started", flush=True)
            self.say("")
    def off(self, why):
        if self.armed:
            self.armed = False
            self.say(f"autostart is off: {why}")
    def say(self, autostart):
        self.state.publish(String(data=json.dumps({"autostart": autostart})))
    def told(self, name, answer):
        print("called", name, flush=True)
        self.off(name)
        if name == "estop":
            self.stopped.set()
        if name == "home":
            while not told:
                time.sleep(0.05)
            print("home at last", flush=True)
        answer.success, answer.message = True, f"I {name}"
        return answer
    def on_configure(self, state):
        if self.get_parameter("slow").value:
            print("configuring until estop", flush=True)
            self.stopped.clear()
            self.stopped.wait(60)
        print("configured", flush=True)
        return TransitionCallbackReturn.FAILURE if self.get_parameter("bad").value else TransitionCallbackReturn.SUCCESS
    def on_activate(self, state):
        print("activated", flush=True)
        return super().on_activate(state)
rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
told = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: told.append(True))
node = Policy()
executor = MultiThreadedExecutor(2)
executor.add_node(node)
while not told:
    executor.spin_once(timeout_sec=0.05)
print("policy has stopped", flush=True)
node.destroy_node(); rclpy.shutdown()
"""
SYSTEM = """
description: two stand-ins
arguments:
  life: {default: 1000000.0, help: "seconds until the arm dies"}
  bad: {default: false, help: "the policy cannot configure"}
  slow: {default: false, help: "the policy configures until it is told estop"}
  start: {default: true, help: "let it move"}
  policy: {default: true, help: "whether there is one"}
  namespace: {default: "", help: "of all"}
environment: {STAND_IN: here}
processes:
  arm: {module: stand_in_arm, node: stand_in_arm, parameters: {life: $life}, ready: [joint_states]}
  policy:
    module: stand_in_policy
    node: stand_in_policy
    when: $policy
    parameters: {bad: $bad, slow: $slow}
    lifecycle: $start
    services: [start, home, estop]
"""


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stand_in_arm.py").write_text(ARM)
    (tmp_path / "stand_in_policy.py").write_text(POLICY)
    (tmp_path / "two.yaml").write_text(SYSTEM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "two.yaml"


def start(ros: Sandbox, *arguments: object) -> Process:
    return ros.run([sys.executable, "-m", "robopolicy.cli", "up", *map(str, arguments)])


def order(output: str, *texts: str) -> None:
    """Each text is in the output, after the one before."""
    found = [output.find(text) for text in texts]
    assert -1 not in found, f"'{texts[found.index(-1)]}' is missing in\n{output}"
    assert found == sorted(found), output


def test_starts_in_order_and_ends_in_reverse_on_ctrl_c(ros: Sandbox, system: Path) -> None:
    process = start(ros, system, "namespace=left")
    process.wait_for_output("policy runs", 40)
    process.send(signal.SIGINT)
    assert process.wait(20) == 130
    order(
        process.output(),
        "starting arm", "[up] arm runs", "starting policy", "[policy] configured", "[policy] activated", "[policy] started",
        "start: done", "[up] policy runs", "[up] ending", "[policy] policy has stopped", "[up] policy has ended",
        "[arm] arm has stopped", "[up] arm has ended",
    )  # fmt: skip
    assert "__ns:=/left" in process.output()


def test_one_dies_the_others_are_ended_and_the_exit_code_says_which(ros: Sandbox, system: Path) -> None:
    process = start(ros, system, "life=10.0", "start=false")  # long enough for the policy to have come
    assert process.wait(60) == 10  # the first of the file
    order(process.output(), "arm ended with exit code 7; ending the others", "policy has stopped")
    assert "started" not in process.output()
    assert process.output().count("arm ended with exit code 7") == 1


def test_a_policy_that_cannot_configure_ends_everything_with_2(ros: Sandbox, system: Path) -> None:
    process = start(ros, system, "bad=true")
    assert process.wait(40) == 2
    order(process.output(), "[policy] configured", "policy could not configure", "arm has stopped")


def test_a_node_of_the_name_is_not_driven_but_refused(ros: Sandbox, system: Path) -> None:
    theirs = ros.start("stand_in_policy")
    ros.until(lambda: "stand_in_policy" in ros.node.get_node_names(), 20, "their node")
    process = start(ros, system)
    assert process.wait(40) == 2
    assert f"a node /stand_in_policy runs already in ROS_DOMAIN_ID {ros.domain}: end it" in process.output()
    assert "starting" not in process.output()
    assert "configured" not in theirs.output()
    assert theirs.alive


def test_somebody_else_s_node_is_not_taken_for_the_child_s(ros: Sandbox, system: Path) -> None:
    """On a busy computer it may be found late, after the look for rivals and before the child's own."""
    theirs, supervisor = ros.start("stand_in_policy"), Supervisor([], {})
    supervisor._node = ros.node
    process = load_system(system).processes({})[1]
    ros.until(lambda: supervisor._there(SimpleNamespace(process=process, popen=theirs)), 20, "the node of that process")
    assert supervisor._nodes("/stand_in_policy") == 1
    assert not supervisor._there(SimpleNamespace(process=process, popen=SimpleNamespace(pid=theirs.pid + 1)))


def test_a_second_arm_on_the_same_topics_is_refused(ros: Sandbox, system: Path) -> None:
    ros.start("stand_in_arm", node="another")
    ros.until(lambda: ros.node.count_publishers("/joint_states"), 20, "their joint states")
    process = start(ros, system)
    assert process.wait(40) == 2
    assert "/another publishes /joint_states already, as arm would" in process.output()
    assert "starting" not in process.output()


def test_a_node_of_the_name_that_comes_later_is_not_started(ros: Sandbox, system: Path) -> None:
    command = [sys.executable, "-m", "robopolicy.cli", "up", str(system), "start=false"]
    with subprocess.Popen(command, env=ros.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        limit = threading.Timer(90.0, process.terminate)  # whatever is not said, reading ends
        limit.start()
        try:
            assert any("policy runs" in line for line in process.stdout)
            theirs = ros.start("stand_in_policy")
            ros.until(lambda: ros.node.get_node_names().count("stand_in_policy") == 2, 40, "their node")
            found = False
            while not found:  # by the supervisor, too: it refuses a parameter then, which starts nothing
                process.stdin.write("policy set bad false\n")
                process.stdin.flush()
                answer = next(line for line in process.stdout if "bad is " in line or "policy set: " in line)
                found = "two nodes are called" in answer
            process.stdin.write("start\n")
            process.stdin.flush()
            said = next(line for line in process.stdout if "start: " in line)
            assert "start: refused: two nodes are called /stand_in_policy" in said
            process.stdin.write("estop\n")
            process.stdin.flush()
            assert any("estop: done" in line for line in process.stdout), "an emergency stop reaches whoever is there"
        finally:
            limit.cancel()
            process.terminate()
        assert process.wait(20) == 143
    assert "called start" not in theirs.output()


def test_a_killed_child_and_what_is_typed(ros: Sandbox, system: Path) -> None:
    command = [sys.executable, "-m", "robopolicy.cli", "up", str(system), "slow=true"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=ros.environment, stdin=pipe, stdout=pipe, text=True) as process, ExitStack() as last:
        last.callback(process.terminate)  # or a failure would wait for it for ever
        limit = threading.Timer(120.0, process.terminate)  # whatever is not said, reading ends
        limit.start()
        last.callback(limit.cancel)
        assert process.stdin is not None
        assert process.stdout is not None
        seen: list[str] = []

        def read_until(text: str) -> None:
            for line in process.stdout or ():
                seen.append(line)
                if text in line:
                    return
            pytest.fail(f"'{text}' did not come:\n{''.join(seen)}")

        read_until("configuring until estop")
        assert ros.call(Trigger, "stand_in_policy/estop", seconds=60).success  # by somebody else
        read_until("start: refused: autostart is off: estop")
        read_until("policy runs")
        process.stdin.write("policy set slow false\n")
        process.stdin.flush()
        read_until("slow is False")
        assert not any("started" in line or "called start" in line for line in seen)  # nothing comes after the estop
        process.stdin.write("start\nfly\n")
        process.stdin.flush()
        read_until("start: done: I start")
        assert any("'fly' is none of: policy start, policy home, policy estop" in line for line in seen)
        process.stdin.write("arm set life 20\narm set lief 2\narm set life soon\n")
        process.stdin.flush()
        read_until("arm: life is 20.0 now")  # a float, as the parameter is
        for _ in range(2):
            read_until("arm set: refused")
        assert any("has no parameter 'lief': did you mean 'life'?" in line for line in seen)
        assert any("'soon' is no value of life: give a number" in line for line in seen)
        process.stdin.write("activate\ndeactivate\npolicy cleanup\npolicy set bad true\nconfigure\n")
        process.stdin.flush()
        for text in (
            "policy activate: done",
            "policy deactivate: done",
            "policy cleanup: done",
            "policy: bad is True",
            "policy configure: refused: its",
        ):
            read_until(text)  # in the order in which they were typed, each after the one before
        count = sum("called start" in line for line in seen)
        process.stdin.write("policy set bad false; policy set slow true; configure; activate; home; start\n")
        process.stdin.flush()
        read_until("configuring until estop")
        process.stdin.write("estop\n")
        process.stdin.flush()
        for text in ("policy: home, start dropped, for estop was typed", "policy configure: done", "policy activate: done"):
            read_until(text)
        process.stdin.write("policy set slow false; deactivate; cleanup\n")
        process.stdin.flush()
        read_until("policy cleanup: done")
        assert not any("called home" in line for line in seen)  # what waited when a stop was typed does not come after it
        assert sum("called start" in line for line in seen) == count
        process.stdin.write("configure; activate; start\n")
        process.stdin.flush()
        for text in ("policy configure: done", "activated", "policy activate: done", "called start"):
            read_until(text)
        process.stdin.write("home\n")
        process.stdin.flush()
        read_until("called home")
        process.stdin.write("policy estop\n")
        process.stdin.flush()
        read_until("estop: done: I estop")
        assert not any("home at last" in line for line in seen), "an emergency stop waits for nothing"
        children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "stand_in_policy"], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
        read_until("policy was killed by SIGKILL; ending the others")
        read_until("arm has ended")
        assert process.wait(20) == 11  # the second of the file


def test_a_killed_supervisor_leaves_nothing_running(ros: Sandbox, system: Path, tmp_path: Path) -> None:
    process = start(ros, system)
    process.wait_for_output("policy runs", 40)
    process.popen.kill()
    ros.until(lambda: not _running("stand_in_arm") and not _running("stand_in_policy"), 15, "the end of the children")


def _running(module: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if module.encode() in words and f"ROS_DOMAIN_ID={os.environ['ROS_DOMAIN_ID']}".encode() in _environ(path.parent):
            return True
    return False


def _environ(folder: Path) -> list[bytes]:
    try:
        return (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


@pytest.mark.parametrize("typed", ["stop", "estop", "deactivate", "cleanup"])
def test_what_is_typed_takes_back_the_starts_of_that_process(
    typed: str, system: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And of no other: another arm's, or a recorder's."""
    lines = system.read_text().replace("[start, home, estop]", "[start, home, estop, stop]")
    system.write_text(f"{lines}  recorder: {{module: m, node: n, services: [start]}}\n")
    supervisor = Supervisor(load_system(system).processes({}), {})
    monkeypatch.setattr(supervisor, "_change", lambda *_: None)
    supervisor._node = type("Node", (), {"create_client": lambda *_: None})()
    for line in ("policy start", "policy home", "recorder start", typed, "policy start"):
        supervisor._lines.put(line)
    supervisor._hear()
    halts = [("policy", typed)] if typed in HALTS else []
    asked = [(process.name, service) for process, service, *_ in supervisor._asked]
    assert asked == [("recorder", "start"), *halts, ("policy", "start")]
    assert supervisor._steps == {"policy": ["configure", "activate"] if halts else []}
    before, on = ("start", "start") if halts else ("configure, activate, start", "configure and activate and start")
    said = f"policy: {before}, start, home dropped, for {typed} was typed; nothing starts before you type {on}"
    assert said in capsys.readouterr().out
    monkeypatch.setattr("hardware.ros2.supervisor.Child", lambda process, _: pytest.fail(" ".join(process.arguments)))
    with pytest.raises(pytest.fail.Exception, match="autostart:=false"):  # it does not start by itself, either
        supervisor._start(supervisor._processes[1])


@pytest.mark.parametrize(
    ("typed", "left", "dropped", "on"),
    [
        ("deactivate", [], "start", "activate and start"),
        ("cleanup", ["activate"], "activate, start", "configure and activate and start"),
    ],
)
def test_the_way_up_that_is_told_is_from_where_what_is_typed_leads(
    typed: str, left: list[str], dropped: str, on: str,
    system: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    supervisor = Supervisor(load_system(system).processes({}), {})
    monkeypatch.setattr(supervisor, "_change", lambda *_: None)
    supervisor._node = type("Node", (), {"create_client": lambda *_: None})()
    supervisor._steps["policy"] = left
    for line in ("policy start", typed):
        supervisor._lines.put(line)
    supervisor._hear()
    said = f"policy: {dropped} dropped, for {typed} was typed; nothing starts before you type {on}"
    assert said in capsys.readouterr().out


def test_what_is_typed_waits_for_the_answer_before_it_and_a_stop_does_not(
    system: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`arm reset; reset; start`: where the arm is then, not before."""
    lines = system.read_text().replace("[start, home, estop]", "[start, estop, stop, reset]")
    system.write_text(f"{lines}  recorder: {{module: m, node: n, services: [start]}}\n")
    supervisor = Supervisor(load_system(system).processes({}), {})
    supervisor._node = SimpleNamespace(get_node_names_and_namespaces=list)
    asked: list[str] = []
    answers: list[Future[Any]] = []

    def client(_: Any, name: str, kind: str) -> Any:
        def call(request: Any) -> Future[Any]:
            asked.append(name)
            answers.append(Future())
            return answers[-1]

        return SimpleNamespace(service_is_ready=lambda: True, call_async=call)

    monkeypatch.setattr("hardware.ros2.supervisor.client", client)

    def typed(*lines: str) -> list[str]:
        for line in lines:
            supervisor._lines.put(line)
        supervisor._hear()
        supervisor._ask()
        return [name.rpartition("/")[2] for name in asked]

    assert typed("recorder start", "policy reset", "policy start") == ["start"]
    assert typed() == ["start"]
    answers[0].set_result(SimpleNamespace(success=True, message=""))
    assert typed() == ["start", "reset"]
    assert typed("stop") == ["start", "reset", "stop"]  # and the start is taken back
    answers[1].set_result(SimpleNamespace(success=True, message=""))
    assert typed("policy start") == ["start", "reset", "stop", "start"]
    assert typed("policy reset")[-1] == "start"
    assert supervisor._answer is not None
    supervisor._answer = supervisor._answer[0], time.monotonic()  # it was lost
    assert typed()[-1] == "reset"
    assert "policy: start, start dropped, for stop was typed" in capsys.readouterr().out


# ---- files ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["virtual", "policy", "record"])
def test_files_that_come_with_the_project(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    system = load_system(up.find(name))
    assert all(argument.help for argument in system.arguments.values())
    assert system.environment["FASTDDS_BUILTIN_TRANSPORTS"] == "LARGE_DATA"
    assert system.processes({})
    assert cli.main(["up", name, "--show-args"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^{argument}=", shown, re.M) for argument in system.arguments)


def test_the_virtual_arm_alone_recording_and_namespaces() -> None:
    system = load_system(up.find("virtual"))
    assert [process.name for process in system.processes({"checkpoint": ""})] == ["arm"]
    names = [process.name for process in system.processes({"record": "x.zarr"})]
    assert names == ["arm", "recorder", "policy"]  # the policy last: it is ended first
    arm = system.processes({"namespace": "left"})[0]
    assert arm.node == "/left/virtual_arm"
    assert arm.ready == ("/left/joint_states",)
    assert arm.arguments[:3] == ("--ros-args", "-r", "__ns:=/left")


def test_values_reach_ros_with_their_types(system: Path) -> None:
    arm = load_system(system).processes({"life": "3"})[0]
    assert "life:=3.0" in arm.arguments  # a whole number would be refused by a node whose parameter is a float


def test_texts_that_look_like_numbers_stay_texts(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("arguments: {out: {default: a, help: b}}\nprocesses: {p: {module: m, parameters: {out: $out, empty: ''}}}")
    assert load_system(file).processes({"out": "12"})[0].arguments == ("--ros-args", "-p", 'out:="12"')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processes: {p: {modul: m}}", "unknown key 'modul': did you mean 'module'?"),
        ("processes: {p: {}}", "has no 'module'"),
        ("arguments: {rate: {default: 1}}\nprocesses: {p: {module: m, when: $rat}}", "did you mean 'rate'?"),
        ("[1]", "is a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_in_a_file_name_the_key(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(SystemFileError, match=re.escape(expected)):
        load_system(file)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["virtul"], "did you mean 'virtual'?"),
        (["./no.yaml"], "'no.yaml' cannot be read: No such file"),
        (["virtual", "chekpoint=x"], "unknown argument 'chekpoint': did you mean 'checkpoint'?"),
        (["virtual", "start=maybe"], "argument 'start' is 'maybe'; expected true or false"),
        (["virtual", "start"], "'start' is not of the form KEY=VALUE"),
        (["virtual", "speed_scale=3"], "policy: key 'speed_scale': Input should be less than or equal to 1, found 3.0"),
        (["policy", "mode=shadwo"], "policy: key 'mode': Input should be 'live' or 'shadow', found 'shadwo'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["up", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["profile=ur55"], "no profile 'ur55': did you mean 'ur5e'?"),
        (["profile=ur5e"], "the policy was trained with shape (7,), the robot has (6,)"),
        (["profile=virtual_reach"], "trained for task 'lift', and the arm stands in front of 'reach' (profile 'virtual_reach')"),
        (["task=stack"], "trained for task 'lift', and the arm stands in front of 'stack' (profile 'virtual')"),
        (["seed=-3"], "arm: key 'seed': Input should be greater than or equal to 0, found -3"),
        (["checkpoint=outputs/nope"], "checkpoint 'outputs/nope' does not exist"),
        (["checkpoint=CUT"], "is no complete safetensors file"),
        (["executor=foo"], "unknown executor 'foo': valid: ensemble, latest, receding"),
        (["executor={type: "], "executor={type: ': the value is not valid YAML"),
        (["planner=rtx"], "unknown planner 'rtx': did you mean 'rti'?"),
        (["planner={type: rti, stepps: 3}"], "stepps"),
        (["record=x.zarr", "checkpoint=", "profile=ur55"], "no profile 'ur55'"),
    ],
)
def test_what_could_not_be_configured_is_refused_before_the_arm_starts(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Supervisor, "run", lambda _: pytest.fail("it starts"))
    save_policy(tmp_path / "good")
    save_policy(tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "policy.safetensors", 100)
    words = [word.replace("CUT", str(tmp_path / "cut")) for word in arguments]
    assert cli.main(["up", "virtual", f"checkpoint={tmp_path / 'good'}", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_a_good_policy_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Supervisor, "run", lambda _: 0)
    save_policy(tmp_path)
    assert cli.main(["up", "virtual", f"checkpoint={tmp_path}", "planner={type: rti, t_start: 0.8}", "executor=ensemble"]) == 0
    assert cli.main(["up", "virtual", f"checkpoint={tmp_path}", "profile=virtual_reach", "task=lift"]) == 0  # as the policy


def test_strangers_in_the_domain_are_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    refused = ["up", "virtual", "speed_scale=3"]  # so that nothing starts
    monkeypatch.delenv("ROS_DOMAIN_ID", raising=False)
    monkeypatch.delenv("ROS_AUTOMATIC_DISCOVERY_RANGE", raising=False)
    assert cli.main(refused) == 2
    assert "[up] ROS_DOMAIN_ID: not set: 0, which every ROS on this network shares" in capsys.readouterr().out
    monkeypatch.setenv("ROS_DOMAIN_ID", "7")
    assert cli.main(refused) == 2
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("ROS_DOMAIN_ID", "seven")
    assert cli.main(["up", "virtual"]) == 2
    assert "'seven' is no domain; export ROS_DOMAIN_ID=N" in capsys.readouterr().err


def test_a_file_of_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("start: maybe\n")
    assert cli.main(["up", "virtual", "--config", str(tmp_path / "mine.yaml")]) == 2
    assert "'maybe'" in capsys.readouterr().err
    start = time.monotonic()
    assert cli.main(["up", "virtual", "--config", str(tmp_path / "no.yaml")]) == 2
    assert time.monotonic() - start < 5
