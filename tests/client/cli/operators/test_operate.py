"""``farshore scale``, ``drain``, ``down`` and ``events`` through a gateway, with a controller of the test."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from farshore.proto import admin_pb2

(SERVICE,) = admin_pb2.DESCRIPTOR.services_by_name.values()
EVENT = dict(number=7, unix_s=1.5, kind="lost", subject="attention-0-a", detail="no answer")


class Controller:
    """Answers each call with ``answers[name]``: the fields of a message, a list of them for a stream, or an
    error. Serves at ``address``."""

    def __init__(self):
        self.asked = []
        self.statuses = []  # each is answered once, the last again and again
        self.following = threading.Event()  # an event stream waits for more
        self.answers = {
            "Scale": dict(dense_workers=1, attention_workers=4),
            "Drain": dict(worker_id="attention-0-a"),
            "Down": {},
            "WatchEvents": [EVENT, EVENT | dict(number=8, detail="")],
        }
        server = grpc.server(ThreadPoolExecutor(4))
        handlers = {method.name: self._handler(method) for method in SERVICE.methods}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)])
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        self._server = server
        server.start()

    def stop(self):
        self._server.stop(None).wait(30)

    def _handler(self, method):
        make = GetMessageClass(method.output_type)

        def answer(request, context):
            self.asked.append((method.name, request))
            fields = self.answers.get(method.name)
            if method.name == "ClusterStatus":
                fields = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
            if isinstance(fields, tuple):
                context.abort(*fields)
            return fields

        def stream(request, context):
            yield from (make(**fields) for fields in answer(request, context))
            if request.follow:
                ended = threading.Event()
                context.add_callback(ended.set)
                self.following.set()
                ended.wait(30)

        return (
            grpc.unary_stream_rpc_method_handler(
                stream,
                request_deserializer=GetMessageClass(method.input_type).FromString,
                response_serializer=make.SerializeToString,
            )
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler(
                lambda request, context: make(**answer(request, context)),
                request_deserializer=GetMessageClass(method.input_type).FromString,
                response_serializer=make.SerializeToString,
            )
        )


@pytest.fixture
def controller():
    serving = Controller()
    yield serving
    serving.stop()


@pytest.fixture
def address(harness, loop_thread, served, controller):
    """A gateway's address."""
    with harness.gateway(loop_thread, served, controller=controller.address) as running:
        yield running.address


@pytest.fixture
def ask(run, address):
    """ask("down", …) -> code, out and err."""
    return lambda *arguments: run(*arguments, "--server", address)


def test_scale(ask, controller):
    done = ask("scale", "attention=4")
    assert (done.code, done.out, done.err) == (0, "dense=1 attention=4\n", "")
    ((_, request),) = controller.asked
    assert request.attention_workers == 4 and not request.HasField("dense_workers")
    assert json.loads(ask("scale", "dense=1", "--json").out) == {"dense": 1, "attention": 4}


def test_drain(ask, controller):
    held = dict(worker_id="attention-0-a", kind="WORKER_KIND_ATTENTION", state="WORKER_STATE_DRAINING")
    # gRPC makes a call three times.
    away = [(grpc.StatusCode.UNAVAILABLE, "no directory")] * 3
    controller.statuses = [dict(workers=[held]), *away, {}]
    done = ask("drain", "attention-0", "--drain-timeout", "2.5")
    assert (done.code, done.out) == (0, "attention-0-a has ended\n")
    assert done.err.splitlines()[0] == "draining attention-0-a: 0 sequences left"
    assert "no directory" in done.err
    name, request = controller.asked[0]
    assert (name, request.worker_id, request.timeout_s) == ("Drain", "attention-0", 2.5)
    done = ask("drain", "attention-0", "--json")
    assert json.loads(done.out) == {"worker_id": "attention-0-a", "ended": True}


def test_drain_without_waiting(ask, controller):
    assert ask("drain", "attention-0", "--no-wait").out == ""
    done = ask("drain", "attention-0", "--no-wait", "--json")
    assert json.loads(done.out) == {"worker_id": "attention-0-a", "ended": False}
    assert {name for name, _ in controller.asked} == {"Drain"}


def test_down(ask, controller):
    done = ask("down")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert json.loads(ask("down", "--json").out) == {"down": True}
    assert [name for name, _ in controller.asked] == ["Down", "Down"]


def test_events(ask):
    lines = ask("events").out.splitlines()
    assert lines[0].endswith("  lost      attention-0-a  no answer") and lines[1].endswith("attention-0-a")
    first, second = map(json.loads, ask("events", "--json").out.splitlines())
    assert first == EVENT and second["number"] == 8


def test_events_are_followed_until_ctrl_c(terminal, address, controller):
    shown = terminal("events", "--follow", "--server", address)
    shown.expect("no answer")
    assert controller.following.wait(30)
    shown.send("\x03")
    code, rest = shown.end()
    assert code == 0 and "Traceback" not in rest


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Scale", ("scale", "dense=1")),
        ("Drain", ("drain", "x")),
        ("Down", ("down",)),
        ("WatchEvents", ("events",)),
        ("ClusterStatus", ("status",)),
        ("ClusterStatus", ("top",)),
    ],
)
@pytest.mark.parametrize(
    ("status", "code"),
    [(grpc.StatusCode.NOT_FOUND, 1), (grpc.StatusCode.INVALID_ARGUMENT, 1), (grpc.StatusCode.UNAVAILABLE, 3)],
)
def test_exit_codes_of_the_controllers_errors(ask, controller, name, arguments, status, code):
    controller.statuses = [(status, "not now")]
    controller.answers[name] = (status, "not now")
    done = ask(*arguments)
    assert (done.code, done.out) == (code, "") and "not now" in done.err
    assert done.err.count("\n") == 1


def test_ctrl_c_while_a_drain_is_awaited(terminal, address, controller):
    controller.statuses = [dict(workers=[dict(worker_id="attention-0-a")])]
    shown = terminal("drain", "attention-0", "--server", address)
    shown.expect("0 sequences left")
    shown.send("\x03")
    code, rest = shown.end()
    assert code == 130 and "Traceback" not in rest
