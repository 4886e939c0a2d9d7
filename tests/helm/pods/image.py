"""The root of containers: what an image holds. Used by ``pod``; made by ``conftest``, or from a tree.

Must not know pods.
"""

import os
import sys
import sysconfig
from pathlib import Path

import farshore

SCRIPT = "#!{python}\nimport sys\nfrom {module} import {name}\nsys.exit({name}())\n"


class Image:
    """The root of containers. ``tree``: the folder that holds it, and ``folders`` what containers see of it.
    ``extra``: more folders, which they see where they are. ``files``: more files, {path: text}."""

    def __init__(self, tree, *, folders=("usr",), extra=(), files=(), env):
        self.env = dict(env)
        self.etc = str(Path(tree) / "etc")
        self.files = dict(files)
        entries = [Path(tree) / name for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32")]
        self.links = {f"/{path.name}": os.readlink(path) for path in entries if path.is_symlink()}
        self.binds = [[str(Path(tree) / name), f"/{name}", True] for name in folders]
        self.binds += [[str(folder), str(folder), True] for folder in extra]


def this_installation():
    """An Image of this Python with what is installed in it, instead of the Dockerfile's."""
    folders = {Path(sys.prefix), Path(sys.base_prefix), Path(sysconfig.get_path("purelib"))}
    folders |= {Path(path) for path in sys.path if path.endswith("site-packages")}
    # An editable installation's root.
    folders.add(Path(farshore.__file__).parents[1])
    folders = sorted(each for each in folders if each.is_dir() and not each.is_relative_to("/usr/lib"))
    tops = [each for each in folders if not any(each.is_relative_to(o) for o in folders if o != each)]
    scripts = {
        "/opt/farshore/bin/farshore": ("farshore.client.cli.main", "main"),
        "/opt/farshore/bin/ray": ("ray.scripts.scripts", "main"),
    }
    files = {
        path: SCRIPT.format(python=sys.executable, module=module, name=name)
        for path, (module, name) in scripts.items()
    }
    # The user of the Dockerfile.
    files["/etc/passwd"] = "root:x:0:0::/root:/bin/sh\nfarshore:x:1000:1000::/tmp:/usr/sbin/nologin\n"
    files["/etc/group"] = "root:x:0:\nfarshore:x:1000:\n"
    env = {
        "PATH": "/opt/farshore/bin:/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return Image("/", extra=[top for top in tops if top != Path("/usr")], files=files, env=env)
