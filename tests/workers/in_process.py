"""Workers in a test's own process."""

from farshore.ids import WorkerId
from farshore.model_spec import ModelSpec
from farshore.workers.attention import AttentionWorker
from farshore.workers.dense import DenseConfig
from farshore.workers.engine.admission import EngineLimits

DENSE = WorkerId("dense-0-aa")


def dense_config(folder):
    """A dense worker with the model of ``folder``, which keeps all KV itself."""
    return DenseConfig(
        token=None,
        worker=DENSE,
        slot="dense-0",
        spec=ModelSpec(model=str(folder)),
        dtype="float32",
        kv_format="float32",
        kv_memory_bytes=64 << 20,
        offload=False,
        shard_by="range",
        listen="127.0.0.1:0",
        threads=1,
        limits=EngineLimits(),
    )


def attention_worker(directory, **options):
    """One that serves, and that ``directory`` lists."""
    return AttentionWorker(
        token=None,
        worker=WorkerId("attention-0-aa"),
        kv_memory_bytes=8 << 20,
        listen="127.0.0.1:0",
        threads=1,
        slot="attention-0",
        directory=directory,
        **options,
    )
