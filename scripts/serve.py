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
from zoo.deployment.pictures import open_picture

session = zoo.InferenceSession(os.environ["MODEL"])
session(Image.new("RGB", (8, 8)))  # a file that takes no pictures fails here, not at a request


def classified(body: bytes) -> JSONResponse:
    """The logits of the picture in `body`, and the class of the largest."""
    try:
        picture = open_picture(io.BytesIO(body))
    except zoo.ZooError as error:
        return JSONResponse({"error": str(error)}, status_code=400)
    (logits,) = session(picture)
    names = session.metadata.classes or tuple(map(str, range(len(logits))))
    return JSONResponse({"class": names[logits.argmax()], "logits": logits.tolist()})


async def classify(request: Request) -> JSONResponse:
    """Decoding and inference in a thread, so that other requests are heard meanwhile."""
    return await run_in_threadpool(classified, await request.body())


app = Starlette(routes=[Route("/", classify, methods=["POST"])])
