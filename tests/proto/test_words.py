from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api
from farshore.proto.words import word


def test_words():
    assert word(admin.WorkerKind, admin.WORKER_KIND_DENSE) == "dense"
    assert word(api.FinishReason, api.FINISH_REASON_STOP) == "stop"
    assert word(admin.WorkerState, admin.WORKER_STATE_UNSPECIFIED) == "unspecified"


def test_a_number_of_a_newer_version():
    assert word(admin.WorkerState, 999) == "unspecified"
