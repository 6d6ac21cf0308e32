"""Fine-tune all of GPT-J on the machine you have.

The same jobs as the command line, as functions: each takes its options and, if it is to talk, a report.
"""

from gptj_stream.config import PRESETS, ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.evaluate import Evaluation, evaluate
from gptj_stream.generate import Piece, generate, stream
from gptj_stream.options import (
    EvaluateOptions,
    GenerateOptions,
    PrepareOptions,
    TokenizerOptions,
    TrainOptions,
)
from gptj_stream.prepare import prepare, train_bpe
from gptj_stream.pretrained import Pretrained, load
from gptj_stream.report import ConsoleReport, Report
from gptj_stream.train import TrainResult, train

__all__ = [
    "PRESETS",
    "ConsoleReport",
    "EvaluateOptions",
    "Evaluation",
    "GenerateOptions",
    "ModelConfig",
    "Piece",
    "PrepareOptions",
    "Pretrained",
    "Report",
    "TokenizerOptions",
    "TrainOptions",
    "TrainResult",
    "UserError",
    "evaluate",
    "generate",
    "load",
    "prepare",
    "stream",
    "train",
    "train_bpe",
]
