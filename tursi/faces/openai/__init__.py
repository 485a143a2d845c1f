"""The OpenAI API: embeddings, chat completions, completions.

Each route exists twice: under ``/v1`` the body names the model; under
``/models/{name}/v1`` the path does, and the body may say what it likes, as
clients that were given the URL of one model do.
"""

from __future__ import annotations

from dataclasses import replace

from tursi.faces.openai import chat, completions, embeddings, errors
from tursi.faces.route import Route

_NAMED_BY_BODY = (
    Route(
        name="openai.embeddings",
        path="/v1/embeddings",
        model="body",
        tasks=embeddings.TASKS,
        decode=embeddings.decode,
        error=errors.answer,
        failure=errors.failure,
        summary="Embed texts",
        body=(embeddings.EmbeddingBody,),
        reply=(embeddings.EmbeddingList,),
    ),
    Route(
        name="openai.chat",
        path="/v1/chat/completions",
        model="body",
        tasks=chat.TASKS,
        decode=chat.decode,
        error=errors.answer,
        failure=errors.failure,
        summary="Continue a chat",
        body=(chat.ChatBody,),
        reply=(chat.ChatCompletion,),
    ),
    Route(
        name="openai.completions",
        path="/v1/completions",
        model="body",
        tasks=completions.TASKS,
        decode=completions.decode,
        error=errors.answer,
        failure=errors.failure,
        summary="Continue texts",
        body=(completions.CompletionBody,),
        reply=(completions.Completion,),
    ),
)

ROUTES: tuple[Route, ...] = (
    *_NAMED_BY_BODY,
    *(
        replace(
            route,
            name=f"{route.name}.model",
            path=f"/models/{{name}}{route.path}",
            model="path",
            summary=f"{route.summary} (the path names the model)",
        )
        for route in _NAMED_BY_BODY
    ),
)
