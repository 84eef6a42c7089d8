"""What a checkpoint asks of a machine, how fast and how well it runs.

`info` without loading it, `bench` and `evaluate` by running it; `doctor` checks this machine's
backends. Results are values; the command line prints them.
"""
