"""The chapter's engine, as plainly as it can be written on today's Dynamo: token ids in, new token ids out."""

import argparse

import uvloop
from dynamo.runtime import DistributedRuntime, dynamo_worker
from dynamo.runtime.logging import configure_dynamo_logging
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import ServerArgs


class RequestHandler:
    def __init__(self, engine):
        self.engine = engine

    async def generate(self, request):
        num_output_tokens_so_far = 0
        async for output in await self.start(request):
            finish_reason = output["meta_info"]["finish_reason"]
            if finish_reason:
                yield {"finish_reason": finish_reason["type"]}
                break
            new_token_ids = output["output_ids"][num_output_tokens_so_far:]  # SGLang's list grows while we yield
            num_output_tokens_so_far += len(new_token_ids)
            for token_id in new_token_ids:
                yield {"token_ids": [token_id]}

    async def start(self, request):
        sampling_params = {
            "temperature": request["sampling_options"].get("temperature"),
            "max_new_tokens": request["stop_conditions"].get("max_tokens"),
            "ignore_eos": request["stop_conditions"].get("ignore_eos"),
        }
        sampling_params = {name: value for name, value in sampling_params.items() if value is not None}
        return await self.engine.async_generate(
            input_ids=request["token_ids"], sampling_params=sampling_params, stream=True
        )


@dynamo_worker()
async def worker(runtime: DistributedRuntime, server_args, handler_class):
    engine = Engine(server_args=server_args)
    endpoint = runtime.endpoint("inference.engine.generate")
    await endpoint.serve_endpoint(handler_class(engine).generate)


def main(handler_class=RequestHandler):
    configure_dynamo_logging()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    arguments = parser.parse_args()
    arguments.skip_tokenizer_init = True
    uvloop.run(worker(ServerArgs.from_cli_args(arguments), handler_class))


if __name__ == "__main__":
    main()
