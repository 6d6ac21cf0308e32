"""What more layers cost: peak memory stays, time grows with them. And what the plan said of both before.

    python benchmarks/growth.py --work FOLDER

FOLDER, on a fast disk with 15 GB to spare. Four depths of one width, each as `gptj train` in a cgroup (needs root).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from statistics import median

from full_size import train

from gptj_stream.config import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--memory", default="3GiB", help="of the cgroup")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 28])
    arguments = parser.parse_args()
    rows = []
    for layers in arguments.layers:
        config = PRESETS["gpt-j-6b"].model_copy(
            update={"n_layer": layers, "n_embd": arguments.width, "n_head": arguments.width // 256, "vocab_size": 8192}
            | {"bos_token_id": 8191, "eos_token_id": 8191}
        )
        result = train(
            arguments.work,
            config,
            memory=arguments.memory,
            tokens=arguments.tokens,
            sequence_length=arguments.tokens,
            steps=arguments.steps,
            headroom="0.3GiB",
            more=("--kept-layers", "0"),
        )
        shutil.rmtree(arguments.work / f"model-{layers}x{arguments.width}")
        rows.append((layers, config.parameters, result))
    print(
        f"\n| layers of {arguments.width} | parameters | peak GiB | planned | of it | s a step | planned | of it "
        "| ms a token and layer |\n|---|---|---|---|---|---|---|---|---|"
    )
    for layers, parameters, result in rows:
        seconds = median(result.seconds)
        peak, planned = result.resident / 2**30, result.planned_memory / 2**30
        print(
            f"| {layers} | {parameters / 1e6:,.0f} M | {peak:.2f} | {planned:.2f} "
            f"| {result.planned_memory / result.resident:.2f} | {seconds:.2f} | {result.planned_seconds:.2f} "
            f"| {result.planned_seconds / seconds:.2f} | {1e3 * seconds / arguments.tokens / layers:.3f} |"
        )


if __name__ == "__main__":
    main()
