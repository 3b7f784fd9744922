"""The measurements, one a file; :data:`TASKS` is the registry that the command line reads."""

from liquidfusion.bench.tasks import generate as _generate
from liquidfusion.bench.tasks import perplexity as _perplexity
from liquidfusion.bench.tasks.generate import generate
from liquidfusion.bench.tasks.perplexity import perplexity
from liquidfusion.bench.tasks.task import Record, Task

TASKS: dict[str, Task] = {task.name: task for task in (_generate.TASK, _perplexity.TASK)}

__all__ = ["TASKS", "Record", "Task", "generate", "perplexity"]
