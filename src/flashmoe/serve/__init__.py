"""A model for programs that speak HTTP, in the words of OpenAI's and of Anthropic's API.

A request goes from `app` (routes, who may ask, errors) through `openai` or `anthropic` (its fields,
read by `fields`) into an `Ask`, which is the same for both; the pieces of the answer go through the
API's reply (`openai_reply`, `anthropic`) into `stream` (events, or one object), which also sees
clients leave. `server` listens. Only this room touches starlette and uvicorn; it stands on
`generate`.
"""
