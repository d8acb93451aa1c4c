"""The chapter's processor, as plainly as it can be written on today's Dynamo; it also streams, one dict per token."""

import argparse

import uvloop
from dynamo.runtime import DistributedRuntime, dynamo_worker
from dynamo.runtime.logging import configure_dynamo_logging
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer


class RequestHandler:
    def __init__(self, engine_client, tokenizer):
        self.engine_client = engine_client
        self.tokenizer = tokenizer

    async def process(self, request):
        token_ids = self.tokenizer.apply_chat_template(
            request["messages"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        engine_request = {
            "token_ids": token_ids,
            "sampling_options": {"temperature": request.get("temperature")},
            "stop_conditions": {
                "max_tokens": request.get("max_tokens", 100),
                "ignore_eos": request.get("ignore_eos", False),
            },
        }
        decode_stream = DecodeStream(skip_special_tokens=True)
        output_ids = []
        finish_reason = "stop"
        engine_response = await self.engine_client.generate(engine_request)
        async for chunk in engine_response:
            data = chunk.data()
            output_ids += data.get("token_ids", [])
            if request.get("stream"):
                for token_id in data.get("token_ids", []):
                    if text := decode_stream.step(self.tokenizer.backend_tokenizer, token_id):
                        yield {"content": text}
            if "finish_reason" in data:
                finish_reason = data["finish_reason"]
                break
        if not request.get("stream"):
            yield {"content": self.tokenizer.decode(output_ids, skip_special_tokens=True)}
        usage = {
            "prompt_tokens": len(token_ids),
            "completion_tokens": len(output_ids),
            "total_tokens": len(token_ids) + len(output_ids),
        }
        yield {"finish_reason": finish_reason, "usage": usage}


@dynamo_worker()
async def worker(runtime: DistributedRuntime, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    engine_client = await runtime.endpoint("inference.engine.generate").client()
    await engine_client.wait_for_instances()
    endpoint = runtime.endpoint("inference.processor.process")
    await endpoint.serve_endpoint(RequestHandler(engine_client, tokenizer).process)


if __name__ == "__main__":
    configure_dynamo_logging()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    uvloop.run(worker(parser.parse_args().model))
