"""The chapter's frontend, as plainly as it can be written on today's Dynamo; it also streams, one event per token."""

import argparse
import json
import time
import uuid

import uvicorn
import uvloop
from dynamo.runtime import DistributedRuntime, dynamo_worker
from dynamo.runtime.logging import configure_dynamo_logging
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse


def create_app(processor_client):
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        body = await request.json()
        head = {"id": f"chatcmpl-{uuid.uuid4()}", "created": int(time.time()), "model": body["model"]}
        if body.get("stream"):
            return StreamingResponse(events(head, body), media_type="text/event-stream")
        content, finish_reason, usage = "", None, None
        response_stream = await processor_client.generate(body)
        async for chunk in response_stream:
            data = chunk.data()
            content += data.get("content", "")
            if "finish_reason" in data:
                finish_reason, usage = data["finish_reason"], data["usage"]
                break
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}

    async def events(head, body):
        head = {**head, "object": "chat.completion.chunk"}
        response_stream = await processor_client.generate(body)
        async for chunk in response_stream:
            data = chunk.data()
            delta = {"content": data["content"]} if "content" in data else {}
            choice = {"index": 0, "delta": delta, "finish_reason": data.get("finish_reason")}
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
            if "finish_reason" in data:
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': data['usage']})}\n\n"
                break
        yield "data: [DONE]\n\n"

    return app


@dynamo_worker()
async def worker(runtime: DistributedRuntime, port):
    processor_client = await runtime.endpoint("inference.processor.process").client()
    await processor_client.wait_for_instances()
    config = uvicorn.Config(create_app(processor_client), host="127.0.0.1", port=port, log_level="warning")
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    configure_dynamo_logging()
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8080)
    uvloop.run(worker(parser.parse_args().port))
