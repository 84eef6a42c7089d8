"""What this machine has, and what of it a model is given.

`probe` measures cores, memory and disk; `budget` decides how much memory is for what. Below
everything else: it knows no checkpoint and no model.
"""
