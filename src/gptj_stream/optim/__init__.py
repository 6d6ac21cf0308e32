"""What happens to a layer's weights once its gradient is known: AdamW over flat buffers, schedules, clipping."""

from gptj_stream.optim.adamw import AdamW
from gptj_stream.optim.base import Optimizer, Part, Update
from gptj_stream.optim.schedule import clip_coefficient, scheduled_learning_rate

__all__ = ["AdamW", "Optimizer", "Part", "Update", "clip_coefficient", "scheduled_learning_rate"]
