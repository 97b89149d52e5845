"""A server that answers each chat with the number of its pictures; run as a script with a port."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse, StreamingResponse

app = FastAPI()


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/v1/chat/completions")
async def chat(body: dict[str, Any]) -> Any:
    content = body["messages"][1]["content"]
    if body["model"] == "broken":
        return JSONResponse({"error": {"message": "no such model", "type": "invalid", "code": None}}, 404)
    pictures = sum(part["type"] == "image_url" for part in content)
    bypass = body.get("vlcache", {}).get("bypass", False)

    async def events() -> AsyncIterator[str]:
        for text in (str(pictures), ""):
            await asyncio.sleep(0.01)
            yield event({"delta": {"content": text}, "index": 0})
        usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11,
                 "prompt_tokens_details": {"cached_tokens": 0 if bypass else 5}}  # fmt: skip
        yield event(None, usage)
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def event(choice: dict[str, Any] | None, usage: dict[str, Any] | None = None) -> str:
    choices = [] if choice is None else [choice]
    chunk = {"id": "1", "created": 0, "model": "m", "object": "chat.completion.chunk", "choices": choices}
    return f"data: {json.dumps({**chunk, 'usage': usage})}\n\n"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
