"""A model that runs: text in, text out.

`model` opens a checkpoint and answers. A request goes from `prompt` (a conversation as ids) through
`steps` (its passes, a token at a time), which `scheduler` lets take turns, `sampling` draws from
and `text` spells, to `parse` (text, reasoning, tool calls) and `chat` (the answer as it comes).
`state` is what a sequence carries, `conversations` keeps states for later turns, `stats` counts. It
stands on `checkpoint` and the native core, and prints nothing.
"""
