"""The `flashmoe` program. Text and results go to stdout, everything else to stderr.

`main` has the commands, `report` turns results into text and `progress` draws bars. Nothing imports
it.
"""
