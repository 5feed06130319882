"""The exported folder: stock transformers loads it, it predicts as the global model does, its card says how it came."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import federate
from safetensors.torch import load_file

import client_app
import server_app
from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.model import forward
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import build
from fedbt_app.parts import HeadKind
from fedbt_app.plan import untrained_plan
from fedbt_app.report import export as export_module
from fedbt_app.report.export import export, model_card
from fedbt_app.tasks.batch import Batch
from fedbt_app.wire.local_grid import LocalGrid, simulated

Settings = Callable[..., dict[str, Any]]
LABELS = {
    "classification": {"heart", "kidney", "liver"},
    "ner": {"O", "B-Organ", "I-Organ", "B-Sign", "I-Sign"},
}
STOCK = {
    "mlm": transformers.AutoModelForMaskedLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "ner": transformers.AutoModelForTokenClassification,
}
SENTENCE = "the patient has severe renal failure of heart"


@pytest.fixture
def small(settings: Settings) -> Settings:
    """Return a function that makes the configuration of a run of few rows."""
    return lambda **changes: settings(**({"max_train_examples": 24, "batch_size": 16} | changes))


def run(values: dict[str, Any]) -> dict[str, Any]:
    return server_app.run(LocalGrid(client_app.app, values, simulated(2)), RunConfig.load(values))


def stock(folder: Path, task: str) -> Any:
    """Load an export with stock transformers; nothing may be missing, left over or initialised anew."""
    model, info = STOCK[task].from_pretrained(folder, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    return model.eval()


def test_mlm_export_fills_masks_in_a_stock_pipeline(small: Settings) -> None:
    report = run(small(task="mlm"))
    fill = transformers.pipeline("fill-mask", model=report["model_dir"])
    answers = fill(f"the patient has {fill.tokenizer.mask_token} failure")
    assert len(answers) == 5
    assert all(0 < answer["score"] <= 1 for answer in answers)


def test_classification_export_answers_with_label_names_in_a_stock_pipeline(
    small: Settings,
) -> None:
    report = run(small(task="classification"))
    (answers,) = transformers.pipeline(
        "text-classification", model=report["model_dir"], top_k=None
    )([SENTENCE])
    assert {answer["label"] for answer in answers} == LABELS["classification"]
    assert sum(answer["score"] for answer in answers) == pytest.approx(1.0, abs=1e-5)


def test_ner_export_answers_with_tag_names_in_a_stock_pipeline(small: Settings) -> None:
    report = run(small(task="ner"))
    tag = transformers.pipeline("token-classification", model=report["model_dir"], ignore_labels=[])
    answers = tag(SENTENCE)
    assert len(answers) == len(SENTENCE.split())
    assert {answer["entity"] for answer in answers} <= LABELS["ner"]
    assert set(tag.model.config.label2id) == LABELS["ner"]


@pytest.mark.parametrize("method", ["fedbt", "lora"])
@pytest.mark.parametrize("task", ["mlm", "classification", "ner"])
def test_predictions_of_the_export_equal_those_of_the_global_model(
    small: Settings, tmp_path: Path, task: str, method: str
) -> None:
    rounds = federate(small(task=task, method=method, learning_rate=1e-2), simulated(2)).rounds
    folder = export(tmp_path / "model", rounds.weights, "card")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCE, return_tensors="pt")[
        "input_ids"
    ]
    everywhere = (
        torch.arange(tokens.shape[1])[None]
        if task != "classification"
        else torch.zeros(1, 1, dtype=torch.int64)
    )
    local = build(rounds.weights, untrained_plan(4))
    local.module.eval()
    with torch.no_grad():
        ours = forward.logits(local, Batch(tokens, None, everywhere, everywhere))
        theirs = stock(folder, task)(input_ids=tokens).logits
    torch.testing.assert_close(theirs.reshape(ours.shape), ours, rtol=1e-5, atol=1e-6)


def test_export_holds_the_tensors_of_the_global_model_bit_for_bit(
    small: Settings, tmp_path: Path
) -> None:
    result = federate(small(task="classification"), simulated(2))
    export(tmp_path / "model", result.rounds.weights, "card")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() == result.tensors.keys()
    assert [name for name in stored if not torch.equal(stored[name], result.tensors[name])] == []


@pytest.mark.parametrize("method", ["lora", "fedbt-lora"])
def test_adapters_are_merged_into_the_export(
    small: Settings, tmp_path: Path, tiny_bert: Path, method: str
) -> None:
    rounds = federate(
        small(method=method, lora_rank=2, lora_alpha=6.0, learning_rate=1e-2), simulated(2)
    ).rounds
    export(tmp_path / "model", rounds.weights, "card")
    stored, base = load_file(tmp_path / "model" / "model.safetensors"), Checkpoint(tiny_bert)
    assert [name for name in stored if "lora" in name] == []
    adapted = [part for part in rounds.state.states() if part.startswith("adapter.")]
    assert adapted == [
        f"adapter.{index}" for index in ((0, 1, 2, 3) if method == "lora" else (3, 2))
    ]
    for part in adapted:
        tensors = rounds.state.tensors(part)
        for name in tensors:
            if name.endswith(".lora_A.weight"):
                stem = name.removesuffix(".lora_A.weight")
                learned = 6.0 / 2 * tensors[f"{stem}.lora_B.weight"] @ tensors[name]
                assert float(learned.abs().max()) > 0
                torch.testing.assert_close(
                    stored[f"{stem}.weight"], base.tensor(f"{stem}.weight") + learned
                )


def test_model_card_has_base_data_method_rounds_and_costs(small: Settings, tiny_bert: Path) -> None:
    values = small(task="classification", method="head")
    report = run(values)
    card = (Path(report["model_dir"]) / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n")
    for text in (
        *(
            tiny_bert.name,
            Checkpoint(tiny_bert).fingerprint(HeadKind.SEQUENCE)[:16],
            "local data",
            "train.jsonl",
        ),
        *("`head`", "2 rounds", "seed 5", "2 clients"),
        f"{report['cost']['uplink_bytes'] / 1e6:.1f} MB up",
        f"| accuracy | {report['initial']['accuracy']:.4f} | {report['final']['accuracy']:.4f} |",
    ):
        assert text in card


def test_model_card_of_a_run_without_central_test_set_says_so(
    small: Settings, site_data: Path
) -> None:
    values = small(dataset="none")
    nodes = {node: {"data-path": str(site_data), "name": f"site-{node}"} for node in (1, 2)}
    report = server_app.run(LocalGrid(client_app.app, values, nodes), RunConfig.load(values))
    assert report["final"] == {}
    assert "(no central test set)" in model_card(report, Checkpoint(Path(values["model"])))


def test_export_has_the_dropout_of_the_base_and_not_of_the_run(
    small: Settings, tiny_bert: Path, tmp_path: Path
) -> None:
    rounds = federate(small(dropout=0.3, num_rounds=1), simulated(2)).rounds
    config = json.loads(
        (export(tmp_path / "model", rounds.weights, "card") / "config.json").read_text()
    )
    base = json.loads((tiny_bert / "config.json").read_text())
    for name in (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "num_hidden_layers",
        "vocab_size",
    ):
        assert config[name] == base[name], name


def test_failed_export_leaves_the_earlier_one_and_no_scratch_folder(
    small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = federate(small(num_rounds=1), simulated(2)).rounds
    folder = export(tmp_path / "out" / "model", rounds.weights, "first")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Checkpoint, "tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        export_module.export(folder, rounds.weights, "second")
    assert (folder / "README.md").read_text() == "first"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_second_export_replaces_the_first(small: Settings, tmp_path: Path) -> None:
    rounds = federate(small(num_rounds=1), simulated(2)).rounds
    folder = export(tmp_path / "model", rounds.weights, "first")
    (folder / "left-over").touch()
    export(folder, rounds.weights, "second")
    assert (folder / "README.md").read_text() == "second"
    assert not (folder / "left-over").exists()


def test_further_pretrained_model_is_the_base_of_a_classification_run(
    small: Settings, tmp_path: Path
) -> None:
    first = run(small(task="mlm", method="full", output_dir=str(tmp_path / "first")))
    second = run(
        small(task="classification", model=first["model_dir"], output_dir=str(tmp_path / "second"))
    )
    assert second["refused"] == []
    between = Checkpoint(Path(first["model_dir"]))
    assert second["base_fingerprint"] == between.fingerprint(HeadKind.SEQUENCE)
    assert first["base_fingerprint"] != between.fingerprint(HeadKind.MASKED_LM)
    pretrained = load_file(Path(first["model_dir"]) / "model.safetensors")
    tuned = load_file(Path(second["model_dir"]) / "model.safetensors")
    shallow, deep = (f"bert.encoder.layer.{index}.output.dense.weight" for index in (0, 3))
    assert torch.equal(tuned[shallow], pretrained[shallow])
    assert not torch.equal(tuned[deep], pretrained[deep])
    (answers,) = transformers.pipeline(
        "text-classification", model=second["model_dir"], top_k=None
    )([SENTENCE])
    assert {answer["label"] for answer in answers} == LABELS["classification"]


def test_classifier_of_the_base_goes_on_only_with_the_same_labels(
    small: Settings, tmp_path: Path
) -> None:
    first = run(small(output_dir=str(tmp_path / "first")))
    again = federate(small(model=first["model_dir"], num_rounds=1), simulated(2)).rounds
    assert again.weights.lacking("head") == {}
    turned = federate(
        small(model=first["model_dir"], num_rounds=1, labels="liver,kidney,heart"), simulated(2)
    ).rounds
    assert set(turned.weights.lacking("head")) == {"classifier.weight", "classifier.bias"}


def test_a_run_never_deletes_a_model_that_no_run_has_made(
    small: Settings, tmp_path: Path, tiny_bert: Path
) -> None:
    folder = tmp_path / "out" / "model"
    shutil.copytree(tiny_bert, folder)
    (folder / "NOTES.txt").write_text("three weeks of GPU")
    before = sorted(file.name for file in folder.iterdir())

    def run(**changes: Any) -> dict[str, Any]:
        values = small(num_rounds=1, output_dir=str(folder.parent), **changes)
        return server_app.run(
            LocalGrid(client_app.app, values, simulated(2)), RunConfig.load(values)
        )

    with pytest.raises(FedBTError, match=r"the base model lies in .*/out/model"):
        run(model=str(folder))
    with pytest.raises(FedBTError, match=r"holds NOTES\.txt, which no run of FedBT has made"):
        run()
    (folder / "NOTES.txt").unlink()
    with pytest.raises(FedBTError, match="holds a model that no run of FedBT has made"):
        run()
    assert sorted([*(file.name for file in folder.iterdir()), "NOTES.txt"]) == before
    shutil.rmtree(folder)
    run()
    run(seed=6)  # an earlier export gives way
    with pytest.raises(FedBTError, match="the base model lies in"):
        run(
            model=str(folder)
        )  # what a run made is not to be trained on from where the next one goes


@pytest.mark.parametrize("task", ["mlm", "classification", "ner"])
def test_the_cards_own_example_works_on_a_long_note(small: Settings, task: str) -> None:
    report = run(small(task=task, method="head", num_rounds=1, max_length=24))
    card = (Path(report["model_dir"]) / "README.md").read_text(encoding="utf-8")
    assert "the first 24 word pieces of a text (max-length)" in card
    example = card.split("```python\n")[1].split("```")[0].splitlines()[-1]
    made = eval(  # what the card tells people to run
        example.replace("THIS_FOLDER", report["model_dir"]), {"pipeline": transformers.pipeline}
    )
    text = ("[MASK] " if task == "mlm" else "") + "pain " * 700
    assert made(text)
