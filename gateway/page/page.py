"""The live page: one HTML document without foreign parts, and the JSON object that it polls.

Mounted by ``api.openai.endpoints``. The document is put together here from the files beside this module; its
headers allow the scripts and styles in it by their hashes, and nothing else. Must not know what is drawn.
"""

import base64
import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from farshore.gateway.page.watch import Watch

_STYLE, _SCRIPT = ("page.css",), ("picture.js", "page.js")


class Page:
    """The handlers of ``GET /`` and ``GET /status.json``."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        style, script = _joined(*_STYLE), _joined(*_SCRIPT)
        self._document = _joined("page.html").replace("/*style*/", style).replace("/*script*/", script)
        self._headers = {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": (
                f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
                "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                "frame-ancestors 'none'"
            ),
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def document(self, request: Request) -> Response:
        return HTMLResponse(self._document, headers=self._headers)

    async def status(self, request: Request) -> Response:
        """Raises RequestFailed if the controller does not answer."""
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return JSONResponse(await self._watch.read(), headers=headers)


def _joined(*names: str) -> str:
    """The text of files beside this module."""
    folder = files(__package__)
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
