"""``liquidfusion-bench``: measure what a bounded cache keeps of a model, and what it saves.

Everything the command line does is here as functions: :func:`liquidfusion.bench.models.load`,
:func:`liquidfusion.bench.runner.run`, and one function for each task in :mod:`liquidfusion.bench.tasks`.
"""
