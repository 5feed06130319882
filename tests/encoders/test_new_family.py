"""A new model family costs one file and its line in the table: here DistilBERT, by its own modules and names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

import client_app
import server_app
from fedbt_app.config import RunConfig
from fedbt_app.costs.cost_model import CostModel
from fedbt_app.costs.counting import Counts
from fedbt_app.costs.formulas import StepShape
from fedbt_app.costs.meter import DispatchCounter
from fedbt_app.encoders import ENCODERS
from fedbt_app.encoders.base import Encoder
from fedbt_app.model import forward
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import build
from fedbt_app.model.weights import ModelSpec, Weights, new_tensors
from fedbt_app.parts import HEAD
from fedbt_app.plan import METHODS, RunPlan, untrained_plan
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.batch import Batch
from fedbt_app.wire.local_grid import LocalGrid, simulated

# -- the one file ------------------------------------------------------------------------------------------------


class DistilBert(Encoder):
    title = "DistilBERT"
    model_types = ("distilbert",)
    embeddings_at = "distilbert.embeddings"
    blocks_at = "distilbert.transformer.layer"
    bare_names = ("embeddings.", "transformer.")
    dimension_keys = {  # noqa: RUF012 (as in the product's own files, but for a test)
        "depth": "n_layers",
        "hidden": "dim",
        "intermediate": "hidden_dim",
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
    }
    identity = {"n_heads": 12, "activation": "gelu"}  # noqa: RUF012
    dropout_keys = ("dropout", "attention_dropout", "seq_classif_dropout")
    adapted_modules = ("q_lin", "v_lin")

    def run_block(
        self, layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None, at: torch.Tensor | None
    ) -> torch.Tensor:
        attention = layer.attention

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(2, (attention.n_heads, -1)).transpose(1, 2)

        mixed = scaled_dot_product_attention(
            heads(attention.q_lin(hidden)),
            heads(attention.k_lin(hidden)),
            heads(attention.v_lin(hidden)),
            attn_mask=mask,
            dropout_p=attention.dropout.p if layer.training else 0.0,
        )
        attended = layer.sa_layer_norm(attention.out_lin(mixed.transpose(1, 2).flatten(2)) + hidden)
        return layer.output_layer_norm(layer.ffn(attended) + attended)

    def masked_lm(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        return module.vocab_projector(
            module.vocab_layer_norm(module.activation(module.vocab_transform(states)))
        )

    def sequence(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        return module.classifier(module.dropout(torch.relu(module.pre_classifier(states))))

    def token(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        return module.classifier(module.dropout(states))


# -- what it gets for that -------------------------------------------------------------------------------------------

LABELS = {"mlm": (), "classification": ("heart", "kidney", "liver"), "ner": ("B-x", "I-x", "O")}
STOCK = {
    "mlm": transformers.AutoModelForMaskedLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "ner": transformers.AutoModelForTokenClassification,
}


@pytest.fixture
def tiny_distilbert(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a DistilBERT of 4 blocks with random weights and the tiny BERT's word pieces, and register the family."""
    monkeypatch.setitem(ENCODERS, "distilbert", DistilBert())
    folder = tmp_path / "tiny-distilbert"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=32,
        n_layers=4,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=64,
    )
    transformers.DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights_of(folder: Path, task: str) -> Weights:
    checkpoint = Checkpoint(folder)
    spec = ModelSpec(TASKS[task], LABELS[task], dropout=0.0, lora_rank=2)
    bare = Weights(checkpoint, lambda part: {}, spec)
    made = {
        part: new_tensors(bare.lacking(part), seed=1)
        for part in (HEAD, *(f"adapter.{i}" for i in range(4)))
    }
    return Weights(checkpoint, lambda part: made.get(part, {}), spec)


def batch_of(task: str) -> Batch:
    ids = torch.randint(5, 20, (3, 16), generator=torch.Generator().manual_seed(0))
    positions = (
        torch.zeros(3, 1, dtype=torch.int64)
        if task == "classification"
        else torch.tensor([[1, 4, 9]] * 3)
    )
    return Batch(ids, None, positions, torch.ones_like(positions))


@pytest.mark.parametrize("task", LABELS)
def test_the_exact_step_is_that_of_the_stock_model(tiny_distilbert: Path, task: str) -> None:
    local = build(weights_of(tiny_distilbert, task), untrained_plan(4))
    local.module.eval()
    batch = batch_of(task)
    with torch.no_grad():
        wanted = local.module(input_ids=batch.input_ids).logits
        found = forward.logits(local, batch)
    if task == "classification":
        wanted = wanted[:, None]
    else:
        wanted = wanted.gather(1, batch.positions[:, :, None].expand(-1, -1, wanted.shape[2]))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_every_method_trains_what_it_says_and_its_flops_are_counted_without_weights(
    tiny_distilbert: Path,
) -> None:
    shape = {
        "mlm": StepShape(3, 16, 3),
        "classification": StepShape(3, 16, 1),
        "ner": StepShape(3, 16, 3),
    }
    for task in LABELS:
        weights = weights_of(tiny_distilbert, task)
        architecture = weights.checkpoint.architecture
        model = CostModel(architecture, TASKS[task], len(LABELS[task]), rank=2, fused=True)
        assert isinstance(model._flops, Counts)
        for method in METHODS.values():
            plan = RunPlan(method, TASKS[task], 4, 2, "paper").round(0)
            local = build(weights, plan)
            assert {architecture.encoder.part_of(name) for name in local.trained} == set(
                plan.trained_parts
            )
            with DispatchCounter() as counter:
                forward.loss(local, batch_of(task)).backward()
            assert counter.total == model.step_flops(plan, shape[task]), (task, method)


def test_a_toy_family_runs_reports_and_exports(
    tiny_distilbert: Path, settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for task in LABELS:
        output = tmp_path / task
        values = settings(
            task=task,
            model=str(tiny_distilbert),
            max_train_examples=24,
            num_rounds=1,
            output_dir=str(output),
        )
        report = server_app.run(
            LocalGrid(client_app.app, values, simulated(2)), RunConfig.load(values)
        )
        assert not report["refused"]
        assert report["cost"]["stock_flops"] > report["cost"]["train_flops"] > 0
        exported = STOCK[task].from_pretrained(output / "model")
        assert exported.config.model_type == "distilbert"
        assert exported.config.dropout == 0.1
        changed = exported.state_dict()["distilbert.transformer.layer.0.ffn.lin1.weight"]
        base = Checkpoint(tiny_distilbert).tensor("distilbert.transformer.layer.0.ffn.lin1.weight")
        assert torch.equal(changed, base) == (
            task != "mlm"
        )  # whose published order begins with block 0
