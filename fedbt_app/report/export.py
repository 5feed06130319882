"""The result: a stock transformers model folder with tokenizer and model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbt_app.files import replaced_folder
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import build
from fedbt_app.model.weights import Weights
from fedbt_app.plan import untrained_plan
from fedbt_app.tasks import TASKS


def export(folder: Path, weights: Weights, card: str) -> Path:
    """Write the global model to `folder`, whole or not at all, so that stock transformers loads it.

    Adapters are merged into their blocks. Replaces an earlier export.
    """
    model: Any = build(weights, untrained_plan(weights.checkpoint.architecture.depth)).module
    checkpoint = weights.checkpoint
    for name in checkpoint.architecture.encoder.dropout_keys:  # the base's own, not the run's
        setattr(model.config, name, checkpoint.config.get(name, 0.1))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(folder) as scratch:
        model.save_pretrained(scratch)
        checkpoint.tokenizer().save_pretrained(scratch)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        scratch.chmod(0o755)
        for file in scratch.iterdir():
            file.chmod(0o644)
    return folder


def model_card(report: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """Write the card: base, data, method, rounds and what it cost."""
    cost = report["cost"]
    pipeline = TASKS[report["task"]].pipeline
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {pipeline}",
        "tags: [federated-learning, fedbt]",
        "---",
        "",
        f"# A BERT adapted with FedBT ({report['task']})",
        "",
        f"- Base: `{report['model']}` ({checkpoint.architecture.depth} blocks, hidden size "
        f"{checkpoint.architecture.hidden}), fingerprint `{report['base_fingerprint'][:16]}`",
        f"- Data: {report['data']}. It stayed at the {len(report['clients'])} clients; "
        "label names and counts were shared.",
        f"- Method: `{report['method']}`, {len(report['rounds'])} rounds, seed {report['seed']}",
        f"- Cost, all clients together: {cost['train_flops'] / 1e12:.2f} TFLOP, "
        f"{cost['uplink_bytes'] / 1e6:.1f} MB up, {cost['downlink_bytes'] / 1e6:.1f} MB down, "
        f"{cost['client_seconds']:.0f} client seconds",
        "",
        "| central test set | before | after |",
        "|---|---|---|",
        *_score_rows(report),
        "",
        "```python",
        "from transformers import pipeline",
        f'pipeline("{pipeline}", model="THIS_FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _score_rows(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, after in report["final"].items():
        if name in report["initial"]:
            rows.append(f"| {name} | {report['initial'][name]:.4f} | {after:.4f} |")
    return rows or ["| (no central test set) | | |"]
