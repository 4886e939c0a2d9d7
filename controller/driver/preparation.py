"""Makes a configuration mean the same on every node, before a cluster is started or changed.

Used by ``cluster``. A relative path, a missing file or a Redis that does not answer is found here, while
nothing runs yet. Must not know what is started.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from farshore.controller.config import ClusterConfig
from farshore.controller.driver import ray_access
from farshore.controller.reconcile import KINDS, Kind
from farshore.kvstore.directory.connect import open_redis
from farshore.models.files.source import pinned


def given_kinds(given: Collection[str]) -> list[Kind]:
    """The kinds of workers whose numbers are among the fields ``given``."""
    return [kind for kind in KINDS if f"{kind}_workers" in given]


def prepared(config: ClusterConfig, progress: Callable[[str], None]) -> ClusterConfig:
    """The configuration as every node reads it: with absolute paths, and with the commit of a downloaded
    model. Raises InvalidRequest, and TransportError if Redis does not answer."""
    _check_gpus(config)
    config = _with_redis(_with_token_file(config))
    return replace(config, spec=pinned(config.spec, progress=progress))


def _check_gpus(config: ClusterConfig) -> None:
    """Raises InvalidRequest if this host is to run workers on a GPU and can't. On a Ray that is joined each
    worker looks for itself."""
    asked = {"--device": config.device, "--attention-device": config.attention_device}
    asked = {option: device for option, device in asked.items() if device.startswith("cuda")}
    if config.ray_address is not None or not asked:
        return
    # Imported here: PyTorch takes two seconds to import, which a cluster on CPUs need not pay here.
    from farshore.workers.device import choose, look

    facts = look(described=False)
    for option, device in asked.items():
        choose(device, facts, option=option)


def _with_redis(config: ClusterConfig) -> ClusterConfig:
    """The configuration with the absolute paths of Redis's files, after a first call to Redis. Raises
    TransportError or InvalidRequest if that fails."""
    files = {name: getattr(config, f"redis_{name}_file") for name in ("password", "ca", "cert", "key")}
    given = {f"redis_{name}_file": str(Path(file).absolute()) for name, file in files.items() if file}
    config = replace(config, **given)
    if config.redis is not None:
        redis = open_redis(config.redis.url)
        redis.load_state()
        redis.disconnect()
    return config


def _with_token_file(config: ClusterConfig) -> ClusterConfig:
    """The configuration with the absolute path of the token's file; unchanged if a private Ray is to make the
    token. Raises InvalidRequest for a file that is missing or can't be used."""
    if config.token_file is None and config.ray_address is None:
        return config
    return replace(config, token_file=ray_access.token_file(config.token_file))
