"""A checkpoint on disk: files in, a table of spans out.

`open` puts the rest together: `config` and `index` read the JSON files (`json`), `headers` the
safetensors headers, `weights` finds every weight of the architecture among the tensors, and `table`
says where each lies. Everything that can be wrong with files is found here, and no weight is read.
It may use `hub` and `machine`, and knows nothing of text or of generating.
"""
