"""Becomes the command of a container: makes its root, drops every right, and executes it.

Run by ``pod`` as root, in the pod's namespaces and a mount namespace of its own, with one argument: JSON
with ``root`` (an empty folder), ``binds`` ([source, target, read only]), ``links`` ({path: target}),
``etc`` (the folder of the image's /etc), ``files`` ({path: text}), ``cgroups`` (descriptors of their
cgroup.procs), ``env``, ``command``, ``cwd``, ``user`` and ``group``. Imports the standard library alone.
"""

import ctypes
import json
import os
import resource
import shutil
import sys
from pathlib import Path

MS_RDONLY, MS_NOSUID, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 32, 4096, 16384
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
OPEN_FILES = 1024
"""What systemd, and so many a container runtime, allows at first."""

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
ETC = (
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "nsswitch.conf", "alternatives", "ssl", "localtime"),
    *("passwd", "group"),
)

libc = ctypes.CDLL(None, use_errno=True)


def mount(source, target, kind=None, flags=0, data=None):
    encoded = [None if text is None else str(text).encode() for text in (source, target, kind)]
    if libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {source} at {target}")


def bind(source, target, *, read_only):
    """Like a container runtime, makes the place for it where there is none."""
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(source, target, flags=MS_BIND | MS_REC)
    if read_only:
        mount(None, target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)


def make_root(spec):
    root = Path(spec["root"])
    mount("tmpfs", root, "tmpfs", data="mode=755")
    for path, target in spec["links"].items():
        (root / path.lstrip("/")).symlink_to(target)
    (root / "etc").mkdir()
    for name in ETC:
        source = Path(spec["etc"]) / name
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, root / "etc" / name, symlinks=True)
        elif source.exists():
            shutil.copy2(source, root / "etc" / name, follow_symlinks=False)
    for path, text in spec["files"].items():
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(0o755 if text.startswith("#!") else 0o644)
    (root / "proc").mkdir()
    mount("proc", root / "proc", "proc")
    (root / "dev" / "shm").mkdir(parents=True)
    for name in DEVICES:
        bind(f"/dev/{name}", root / "dev" / name, read_only=False)
    for name, target in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        (root / "dev" / name).symlink_to(f"/proc/self/fd{target}")
    bind("/sys", root / "sys", read_only=True)
    for name in ("run", "var/lib", "tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for source, target, read_only in spec["binds"]:
        bind(source, root / target.lstrip("/"), read_only=read_only)
    mount(None, root, flags=MS_REMOUNT | MS_RDONLY)
    return root


def main():
    spec = json.loads(sys.argv[1])
    for descriptor in spec["cgroups"]:
        os.write(descriptor, b"0")
        os.close(descriptor)
    root = make_root(spec)
    os.chroot(root)
    os.chdir(spec["cwd"])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, most))
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setgroups([spec["group"]])
    os.setresgid(*[spec["group"]] * 3)
    os.setresuid(*[spec["user"]] * 3)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execvpe(spec["command"][0], spec["command"], spec["env"])


if __name__ == "__main__":
    main()
