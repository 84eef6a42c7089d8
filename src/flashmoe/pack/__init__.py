"""`flashmoe pack`: a checkpoint written anew in the layout that reads best.

`layout` plans the files, `convert` turns weights from one format into another, `pack` writes. It
reads checkpoints and knows nothing of models that run.
"""
