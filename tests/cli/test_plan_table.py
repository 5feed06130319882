"""What `fedbt plan` predicts of a run."""

from collections.abc import Callable

import pytest

from fedbt_app.cli.plan_table import preview, print_preview
from fedbt_app.cli.presets import PRESETS
from fedbt_app.config import RunConfig
from fedbt_app.encoders.architecture import Architecture

BERT_BASE, MINILM = (
    Architecture.from_config(PRESETS[name], name) for name in ("bert-base", "minilm-l6")
)


def test_ten_rounds_of_bert_base_send_the_published_share_of_the_model(
    config: Callable[..., RunConfig],
) -> None:
    for task, ratio in {"mlm": 0.0704, "ner": 0.2019, "classification": 0.2062}.items():
        made = config(task=task, method="fedbt", num_rounds=10, max_length=128)
        assert round(preview(made, BERT_BASE, 13, 1000).bytes_ratio, 4) == ratio


def test_a_preview_computes_the_frozen_prefix_once_as_clients_do(
    config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {"classification": 0.280, "ner": 0.349}  # by benchmarks/results/client_step.json
    for task, ratio in measured.items():
        values = {"task": task, "method": "fedbt", "num_rounds": 10, "max_length": 128}
        kept, not_kept, too_large = (
            preview(config(**values, prefix_cache_gb=size), BERT_BASE, 13, 1000)
            for size in (4.0, 0.0, 0.1)
        )
        assert round(kept.flops_ratio, 3) == ratio
        assert kept.flops_ratio < not_kept.flops_ratio == too_large.flops_ratio
        for shown, said in (
            (kept, "on disk, 0.39 GB"),
            (too_large, "let prefix-cache-gb be above 0.39 GB"),
        ):
            print_preview(shown, "a run")
            assert said in capsys.readouterr().out


def test_a_preview_computes_the_prefix_once_for_each_fixed_masking(
    config: Callable[..., RunConfig],
) -> None:
    values = {
        "task": "mlm",
        "method": "fedbt",
        "num_rounds": 6,
        "schedule": "-1",
        "masking": "static",
    }
    shown = preview(config(**values, static_maskings=2), MINILM, 0, 100)
    first, second, *others = (one.step_flops for one in shown.rounds)
    assert first == second > others[0]
    assert len(set(others)) == 1
    moving = preview(config(**{**values, "masking": "dynamic"}), MINILM, 0, 100)
    assert {one.step_flops for one in moving.rounds} == {first}


def test_full_training_is_its_own_reference(config: Callable[..., RunConfig]) -> None:
    shown = preview(config(task="mlm", method="full", num_rounds=3), MINILM, 0, 100)
    assert shown.bytes_ratio == 1.0
    assert shown.flops_ratio_same == 1.0
    assert shown.flops_ratio < 1.0
    assert {one.memory_bytes for one in shown.rounds} == {shown.full_memory}
