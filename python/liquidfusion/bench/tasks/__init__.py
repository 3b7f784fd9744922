"""The measurements, one a file; :data:`TASKS` is the registry that the command line reads."""

from liquidfusion.bench.tasks import choice as _choice
from liquidfusion.bench.tasks import generate as _generate
from liquidfusion.bench.tasks import longbench as _longbench
from liquidfusion.bench.tasks import multiturn as _multiturn
from liquidfusion.bench.tasks import needle as _needle
from liquidfusion.bench.tasks import perplexity as _perplexity
from liquidfusion.bench.tasks import reasoning as _reasoning
from liquidfusion.bench.tasks import recall as _recall
from liquidfusion.bench.tasks import ruler as _ruler
from liquidfusion.bench.tasks import summarize as _summarize
from liquidfusion.bench.tasks.choice import choice
from liquidfusion.bench.tasks.generate import generate
from liquidfusion.bench.tasks.longbench import longbench
from liquidfusion.bench.tasks.multiturn import multiturn
from liquidfusion.bench.tasks.needle import needle
from liquidfusion.bench.tasks.perplexity import perplexity
from liquidfusion.bench.tasks.reasoning import reasoning
from liquidfusion.bench.tasks.recall import recall
from liquidfusion.bench.tasks.ruler import ruler
from liquidfusion.bench.tasks.summarize import summarize
from liquidfusion.bench.tasks.task import Record, Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        _generate,
        _perplexity,
        _needle,
        _recall,
        _summarize,
        _choice,
        _ruler,
        _longbench,
        _multiturn,
        _reasoning,
    )
}

__all__ = [
    "TASKS",
    "Record",
    "Task",
    "choice",
    "generate",
    "longbench",
    "multiturn",
    "needle",
    "perplexity",
    "reasoning",
    "recall",
    "ruler",
    "summarize",
]
