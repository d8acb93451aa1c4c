"""The page at `/`: the pipeline as it is now, and a chat that shows which way each request went.

The page is one file without any request to elsewhere, and its policy lets a browser run nothing but that: whatever
a model or a worker says can only ever be text.
"""

import base64
import hashlib
import os
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from common.dynamo.directories import ModelDirectory
from common.dynamo.runtime import Client

PAGE = Path(__file__).with_suffix(".html")


def _hashes(html: str, tag: str) -> str:
    """The sources of a Content-Security-Policy that allow the inline elements of a page, and no others."""
    digests = (hashlib.sha256(text.encode()).digest() for text in re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL))
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def page_headers(html: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(html, "script"),
        "style-src": _hashes(html, "style"),
        "img-src": "data:",  # its icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{directive} {sources}" for directive, sources in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def install_live_page(app: FastAPI, models: ModelDirectory, engine_client: Client) -> None:
    """Serve the page, and what it asks for each second while somebody looks at it."""
    html = PAGE.read_text()
    headers = page_headers(html)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return Response(html, headers=headers, media_type="text/html")

    @app.api_route("/pipeline", methods=["GET", "HEAD"])
    async def pipeline() -> JSONResponse:
        """Who is there, as etcd says now. The ids are in hexadecimal, as in etcd's keys."""
        processors = await models.instances()
        engines = await engine_client.instance_ids()
        return JSONResponse(
            {
                "frontend": {"pid": os.getpid()},
                "processors": [{"instance": f"{id:x}", "models": processors[id]} for id in sorted(processors)],
                "engines": [{"instance": f"{id:x}"} for id in sorted(engines)],
            },
            headers={"cache-control": "no-store"},
        )
