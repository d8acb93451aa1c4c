"""The chapter's engine after step 1: tokens that come with a finish_reason count. bench/ measures this one."""

import engine


class RequestHandler(engine.RequestHandler):
    async def generate(self, request):
        num_output_tokens_so_far = 0
        async for output in await self.start(request):
            new_token_ids = output["output_ids"][num_output_tokens_so_far:]
            num_output_tokens_so_far += len(new_token_ids)
            for token_id in new_token_ids:
                yield {"token_ids": [token_id]}
            if output["meta_info"]["finish_reason"]:
                yield {"finish_reason": output["meta_info"]["finish_reason"]["type"]}


if __name__ == "__main__":
    engine.main(RequestHandler)
