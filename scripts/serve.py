"""Serve an exported network over HTTP: uvicorn serve:app, with $MODEL the ONNX file.

curl --data-binary @picture.jpg http://localhost:8000
"""

import io
import os

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import zoo

session = zoo.InferenceSession(os.environ["MODEL"])


async def classify(request: Request) -> JSONResponse:
    """The logits of the picture in the body, and the class of the largest."""
    try:
        picture = Image.open(io.BytesIO(await request.body())).convert("RGB")
    except OSError as error:
        return JSONResponse({"error": str(error)}, status_code=400)
    (logits,) = await run_in_threadpool(session, picture)
    names = session.metadata.classes or tuple(map(str, range(len(logits))))
    return JSONResponse({"class": names[logits.argmax()], "logits": logits.tolist()})


app = Starlette(routes=[Route("/", classify, methods=["POST"])])
