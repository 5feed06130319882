"""The result: a stock transformers model folder with tokenizer and model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbt_app.errors import FedBTError, without_folders
from fedbt_app.files import replaced_folder
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import build
from fedbt_app.model.weights import Weights
from fedbt_app.plan import untrained_plan
from fedbt_app.tasks import TASKS

_TAG = "tags: [federated-learning, fedbt]"  # in the card: says that an export of ours this is
_WRITTEN = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
}


def export(folder: Path, weights: Weights, card: str, max_length: int | None = None) -> Path:
    """Write the global model to `folder`, whole or not at all, so that stock transformers loads it.

    Adapters are merged into their blocks. Replaces an earlier export. `max_length` is what the
    tokenizer cuts at when it is asked to: the length that was trained on.
    """
    model: Any = build(weights, untrained_plan(weights.checkpoint.architecture.depth)).module
    checkpoint = weights.checkpoint
    for name in checkpoint.architecture.encoder.dropout_keys:  # the base's own, not the run's
        setattr(model.config, name, checkpoint.config.get(name, 0.1))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer = checkpoint.tokenizer()
        if max_length is not None:
            tokenizer.model_max_length = max_length
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        scratch.chmod(0o755)
        for file in scratch.iterdir():
            file.chmod(0o644)
    return folder


def refuse_to_overwrite(folder: Path, base: Path) -> None:
    """Refuse an export that would delete what no run has made: the base itself, or files that are
    not an export's.

    Raises
    ------
    FedBTError
        With the name of what stands in the way.
    """
    if base.resolve().is_relative_to(folder.resolve()):
        raise FedBTError(
            f"the base model lies in {folder}, where the trained model goes: choose another output-dir"
        )
    if not folder.exists():
        return
    foreign = sorted(file.name for file in folder.iterdir() if file.name not in _WRITTEN)
    card = folder / "README.md"
    if (
        not foreign
        and card.is_file()
        and _TAG in card.read_text(encoding="utf-8", errors="replace")
    ):
        return
    what = f"{foreign[0]}, which" if foreign else "a model that"
    raise FedBTError(
        f"{folder}, where the trained model goes, holds {what} no run of FedBT has made: move it, or choose another "
        "output-dir"
    )


def model_card(report: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """Write the card: base, data, method, rounds and what it cost."""
    cost = report["cost"]
    pipeline = TASKS[report["task"]].pipeline
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {pipeline}",
        _TAG,
        "---",
        "",
        f"# A BERT adapted with FedBT ({report['task']})",
        "",
        f"- Base: `{without_folders(report['model'])}` ({checkpoint.architecture.depth} blocks, hidden size "
        f"{checkpoint.architecture.hidden}), fingerprint `{report['base_fingerprint'][:16]}`",
        f"- Data: {report['data']}. It stayed at the {len(report['clients'])} clients; "
        "label names and counts were shared.",
        f"- Read: the first {report['config']['max-length']} word pieces of a text (max-length)",
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
        f'pipeline("{pipeline}", model="THIS_FOLDER"{TASKS[report["task"]].pipeline_options})',
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
