"""The volumes of pods that hold what an object says, and the modes that Kubernetes gives to volumes.

Used by ``pod``. Must not know pods.
"""

import base64
import os
import time

READ_ONLY_MASK = 0o440
"""Kubernetes gives a Secret's files to the pod's fsGroup, which may then read them."""


def content(volume, objects):
    """({file: bytes}, mode) of a Secret or ConfigMap volume."""
    kind, key = ("Secret", "secret") if "secret" in volume else ("ConfigMap", "configMap")
    source = volume[key]
    data = objects[kind, source.get("secretName", source.get("name"))]["data"]
    items = source.get("items") or [{"key": name, "path": name} for name in data]
    read = base64.b64decode if kind == "Secret" else str.encode
    return {item["path"]: read(data[item["key"]]) for item in items}, source.get("defaultMode", 0o644)


def write(path, files, mode, *, group):
    """As kubelet's atomic writer: files behind a link, so that all change at once."""
    version = path / f"..{time.time_ns()}"
    version.mkdir()
    for name, data in files.items():
        file = version / name
        file.write_bytes(data)
        os.chown(file, 0, group)
        file.chmod(mode | READ_ONLY_MASK)
        if not (path / name).is_symlink():
            (path / name).symlink_to(f"..data/{name}")
    for folder in (version, path):
        give(folder, group)
    (path / "..next").symlink_to(version.name)
    (path / "..next").replace(path / "..data")


def give(folder, group):
    os.chown(folder, 0, group)
    folder.chmod(0o2775)
