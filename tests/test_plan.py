"""What a plan says: within the limits, in the order of preference, and true of the run that follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptj_stream.choice import fastest_plan, fitting_plan
from gptj_stream.config import PRESETS, ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.options import PlanOptions
from gptj_stream.plan import Plan, described
from gptj_stream.report import Report
from gptj_stream.speed import Speed

CPU = torch.device("cpu")
GIB = 1 << 30
SIX_B = PRESETS["gpt-j-6b"]
SPEED = Speed(
    gemm=4e11, copy=3e10, update=1e-9, block_forward=2.0, block_forward_kept=2.0, block_backward=4.0,
    head=6.0, embed=0.4,
    disk_read=2e9, disk_write=2e9, bus=1e10,
)  # fmt: skip


def options(tmp_path: Path, **values: Any) -> PlanOptions:
    return PlanOptions(preset="gpt-j-6b", output=tmp_path, micro_batch_size=1, **values)


def fitting(config: ModelConfig, given: PlanOptions) -> Plan:
    return fitting_plan(given, config, CPU, torch.bfloat16, 2048, torch.bfloat16)


class TestChoice:
    @pytest.mark.parametrize(
        ("preset", "memory", "kind", "optimizer"),
        [
            ("gpt-j-125m", "16GiB", "resident", "AdamW"),
            ("gpt-j-350m", "5GiB", "resident", "CompactAdamW"),
            ("gpt-j-1.3b", "8GiB", "file", "CompactAdamW"),
        ],
    )
    def test_the_nearest_store_that_fits(
        self, preset: str, memory: str, kind: str, optimizer: str, tmp_path: Path
    ) -> None:
        given = options(tmp_path, memory=memory, global_batch_size=1)
        plan = fitting(
            PRESETS[preset].model_copy(update={"vocab_size": 8192, "eos_token_id": 0, "bos_token_id": 0}), given
        )
        assert (plan.kind, type(plan.optimizer).__name__) == (kind, optimizer)

    @pytest.mark.parametrize("kept_layers", [None, 0, 1])
    def test_limits_are_kept_and_used(self, kept_layers: int | None, tmp_path: Path) -> None:
        config = PRESETS["gpt-j-125m"]
        given = options(tmp_path, memory="3GiB", store="file", global_batch_size=2, kept_layers=kept_layers)
        plan, _ = fastest_plan(fitting(config, given), given.model_copy(update={"sequence_length": 64}), Report())
        total = sum(plan.memory().values())
        assert total <= 3 * GIB
        more = replace(plan, in_memory=plan.in_memory + 1)
        assert plan.in_memory == len(plan.layouts) or sum(more.memory().values()) > 3 * GIB
        if kept_layers is not None:
            assert plan.kept_layers == kept_layers

    def test_too_small(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match=r"least at this --sequence-length is --memory \d+\.\dGiB, \d+\.\dGiB of disk"
        ):
            fitting(SIX_B, options(tmp_path, memory="2GiB"))

    def test_smaller_steps_would_do(self, tmp_path: Path) -> None:
        config = PRESETS["gpt-j-125m"]
        with pytest.raises(UserError, match=r"it fits with --micro-batch-size 1 --global-batch-size \d+$"):
            fitting(config, options(tmp_path, memory="4GiB", global_batch_size=100_000))


class TestFigures:
    """Against arithmetic by hand, for GPT-J-6B at 4096 tokens a step."""

    @pytest.fixture
    def plan(self, tmp_path: Path) -> Plan:
        from gptj_stream.optim.compact import CompactAdamW  # noqa: PLC0415

        state, kept = CompactAdamW(), {"kept_layers": 10, "narrow_layers": 6}
        return Plan(SIX_B, CPU, torch.bfloat16, state, "file", 2048, 1, 2, tmp_path, tmp_path, 0, 2**29, **kept)

    def test_bytes(self, plan: Plan) -> None:
        parameters = 6_050_882_784
        assert plan.state_bytes == pytest.approx(5.125 * parameters, rel=1e-6)
        assert plan.gradient_bytes == plan.weight_bytes == 2 * parameters
        moved = plan.moved()
        assert moved["disk read"] == pytest.approx((5.125 + 2 + 2) * parameters, rel=1e-6)
        assert moved["disk written"] == pytest.approx(7.125 * parameters, rel=1e-6)
        kept = 10 * 4096 * 2 * (4 * 4096 + 16384) + 6 * 4096 * 2 * 4 * 4096
        assert kept <= plan.memory()["kept activations"] <= 1.05 * kept
        assert plan.memory()["inputs of every layer"] == 30 * 4096 * 4096 * 2
        # 31 places of the largest record, and the gradients
        assert plan.disk()["store"] == pytest.approx(31 * 5.125 * 206_489_312 + 2 * parameters, rel=1e-3)

    def test_weights_at_hand_are_not_read(self, plan: Plan) -> None:
        more = replace(plan, in_memory=5)
        layers = [layout.numel for layout in plan.layouts[-5:]]
        assert plan.moved()["disk read"] - more.moved()["disk read"] == 2 * 2 * sum(layers)

    def test_seconds(self, plan: Plan) -> None:
        seconds = plan.seconds(SPEED)
        assert seconds["forward"] == 2 * 28 * 2.0
        # of six blocks the first matrix product of the feed-forward
        assert seconds["computing again"] == pytest.approx(2 * (12 * 2.0 + 6 * 2 * 2048 * 4096 * 16384 / 4e11))
        assert seconds["backward"] == 2 * (28 * 4.0 + 6.0 + 0.4)
        assert seconds["update"] == pytest.approx(6.05, rel=1e-3)
        assert "waiting" not in seconds
        slow = replace(SPEED, disk_read=1e8)
        # forward: state and gradients but for what hides behind it; backward: weights
        forward = 7.125 * 6.050882784e9 / 1e8 + 5.125 * 6.050882784e9 / 2e9 - seconds["forward"] - seconds["update"]
        assert plan.seconds(slow)["waiting"] == pytest.approx(forward, rel=1e-3)
        assert plan.bound(slow) == "disk"
        assert plan.bound(SPEED) == "compute"

    def test_cuda(self, plan: Plan) -> None:
        """The full size within 16 GiB of device memory, with room for 16k tokens a step."""
        there = replace(plan, device=torch.device("cuda"), kept_layers=0, narrow_layers=0, global_batch_size=8)
        assert sum(there.device_memory().values()) < 16 * GIB
        assert there.crosses
        assert there.moved()["to the device"] == 2 * there.weight_bytes
        host = replace(there, kind="host")
        assert sum(host.memory().values()) > host.state_bytes + host.gradient_bytes
        assert host.bound(replace(SPEED, bus=1e7)) == "bus"
        assert "disk" not in described(host, SPEED)


def test_the_plan_command(gptj: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    result = gptj("plan", "--model", checkpoint, "--output", tmp_path / "run", "--store", "file", "--memory", "4GiB")
    assert (result.code, (tmp_path / "run").exists()) == (0, False)
    for line in (
        "model ",
        "step ",
        "store            file, in",
        "memory, at most ",
        "disk ",
        "moved a step ",
        "speed ",
    ):
        assert f"\n  {line}" in "\n" + result.out
