"""A model that runs: text in, text out.

`model` opens a checkpoint and generates; `state` is what a sequence carries; `chat` renders
conversations, `text` turns ids into text as they come, `sampling` draws tokens and `stats` counts.
It stands on `checkpoint` and the native core, and prints nothing.
"""
