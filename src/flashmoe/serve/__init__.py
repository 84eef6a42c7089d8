"""A model for programs that speak HTTP, in the words of OpenAI's and of Anthropic's API.

A request goes past `access` (who may ask) to its address (`app`), through `openai` or `anthropic`
(its fields, read by `fields`) into an `Ask`, which is the same for both. The pieces of the answer
go through the API's reply (`openai_reply`, `anthropic`) into `stream`, which also sees clients
leave, or into one of the `responses`. `server` listens. Only this room touches starlette and
uvicorn; it stands on `generate`.
"""
