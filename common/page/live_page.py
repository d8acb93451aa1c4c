"""The page at `/`: the pipeline as it is now, and a chat that shows which way each request went.

The page is one file without any request to elsewhere, and its policy lets a browser run nothing but that: whatever
a model or a worker says can only ever be text.
"""

import base64
import hashlib
import math
import os
import re
from pathlib import Path

import msgspec
from fastapi import FastAPI
from fastapi.responses import Response

from common.dynamo.directories import Descriptions, ModelDirectory
from common.dynamo.runtime import Client
from common.openai.responses import JsonObject
from common.wire import NUM_LOWEST_HASHES, CacheDescription, EngineDescription, InstanceId

PAGE = Path(__file__).with_suffix(".html")


class Frontend(JsonObject, kw_only=True):
    pid: int


class Cache(JsonObject, kw_only=True):
    """In tokens: how full it is, and how much of that another engine has cached, too."""

    num_tokens: int
    max_num_tokens: int
    num_shared_tokens: int


class Engine(JsonObject, kw_only=True):
    instance: InstanceId
    cache: Cache | None


class Processor(JsonObject, kw_only=True):
    instance: InstanceId
    models: list[str]


class Pipeline(JsonObject, kw_only=True):
    """Who is there, as etcd says now."""

    frontend: Frontend
    processors: list[Processor]
    engines: list[Engine]


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


def cache_figures(caches: dict[int, CacheDescription]) -> dict[int, Cache]:
    """By engine; what is shared, by the samples."""
    samples = {id: set(cache.lowest_block_hashes) for id, cache in caches.items()}
    limit = min((max(sample) for sample in samples.values() if len(sample) == NUM_LOWEST_HASHES), default=math.inf)
    figures = {}
    for id, cache in caches.items():  # as far as all samples go
        own = {block_hash for block_hash in samples[id] if block_hash <= limit}
        elsewhere = set().union(*(sample for other, sample in samples.items() if other != id))
        num_shared = round(cache.num_tokens * len(own & elsewhere) / max(1, len(own)))
        figures[id] = Cache(
            num_tokens=cache.num_tokens, max_num_tokens=cache.max_num_tokens, num_shared_tokens=num_shared
        )
    return figures


def install_live_page(app: FastAPI, models: ModelDirectory, engine_client: Client) -> None:
    """Serve the page, and what it asks for each second while somebody looks at it."""
    html = PAGE.read_text()
    headers = page_headers(html)
    descriptions = Descriptions(engine_client, EngineDescription)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return Response(html, headers=headers, media_type="text/html")

    @app.api_route("/pipeline", methods=["GET", "HEAD"])
    async def pipeline() -> Response:
        """The ids are in hexadecimal, as in etcd's keys."""
        processors = await models.instances()
        engines = await engine_client.instance_ids()
        described = await descriptions.asked_again(lambda engine: engine.cache is not None)
        caches = cache_figures({id: engine.cache for id, engine in described.items() if engine and engine.cache})
        found = Pipeline(
            frontend=Frontend(pid=os.getpid()),
            processors=[Processor(instance=f"{id:x}", models=processors[id]) for id in sorted(processors)],
            engines=[Engine(instance=f"{id:x}", cache=caches.get(id)) for id in sorted(engines)],
        )
        headers = {"cache-control": "no-store"}
        return Response(msgspec.json.encode(found), headers=headers, media_type="application/json")
