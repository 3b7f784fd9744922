"""Other people's caches and presses, measured on the same prompts and scored by the same rules.

``kvpress:…`` names presses of NVIDIA's kvpress, which run in a process with an interpreter of its own;
``transformers:…`` names caches that transformers itself ships, ``python:…`` classes of your own.
"""

from liquidfusion.bench.rivals.names import Framework, Press, Rival, parse
from liquidfusion.bench.rivals.process import RivalError

__all__ = ["Framework", "Press", "Rival", "RivalError", "parse"]
