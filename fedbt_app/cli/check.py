"""`fedbt check`: would this site's data be taken, what is in it, and what would leave the site?

Nothing is sent. `fedbt doctor` looks at model and data by the same functions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbt_app.cli.findings import Finding, Mark, until_failure, warned
from fedbt_app.config import NO_DATA, RunConfig
from fedbt_app.errors import FedBTError, without_folders
from fedbt_app.tasks import TASKS

if TYPE_CHECKING:
    from fedbt_app.data.survey import Split
    from fedbt_app.model.checkpoint import Checkpoint
    from fedbt_app.tasks.fit import Fit


def examine(config: RunConfig) -> Iterator[Finding]:
    """Look at a site's model and data."""
    yield from model_findings(config)
    findings = list(data_findings(config, site=True))
    yield from findings
    if all(finding.ok for finding in findings):
        yield from until_failure("data", _columns(config))


# The model ----------------------------------------------------------------------------------------


def model_findings(config: RunConfig) -> Iterator[Finding]:
    """Look at the base: its weights, its tokenizer, its positions, each on its own."""
    try:
        checkpoint = _checkpoint(config)
    except FedBTError as error:
        yield Finding(Mark.FAILURE, "model", str(error))
        return
    for look in (_weights, _tokenizer, _positions):
        yield from until_failure("model", look(config, checkpoint))


def _checkpoint(config: RunConfig) -> "Checkpoint":
    from fedbt_app.model.checkpoint import Checkpoint, find_model

    return Checkpoint(find_model(config.model), config.cache_folder)


def _weights(config: RunConfig, checkpoint: "Checkpoint") -> Iterator[Finding]:
    arch = checkpoint.architecture
    fingerprint = checkpoint.fingerprint(TASKS[config.task].head)[:12]
    detail = f"{config.model}: {arch.depth} blocks, hidden {arch.hidden}, fingerprint {fingerprint}"
    yield Finding(Mark.OK, "model", detail)


def _tokenizer(config: RunConfig, checkpoint: "Checkpoint") -> Iterator[Finding]:
    facts = checkpoint.tokenizer_facts
    detail = f"tokenizer of {facts.description}, fingerprint {facts.fingerprint[:12]}"
    yield Finding(Mark.OK, "model", detail)
    yield from warned("model", facts.warnings)


def _positions(config: RunConfig, checkpoint: "Checkpoint") -> Iterator[Finding]:
    checkpoint.check_length(config.max_length)
    positions = checkpoint.architecture.dimensions.positions
    yield Finding(Mark.OK, "model", f"{positions} positions, max-length {config.max_length}")


# The data -----------------------------------------------------------------------------------------


def data_findings(config: RunConfig, site: bool = False) -> Iterator[Finding]:
    """Look at the data by the run's own readers: rows, labels, what is cut and what is unknown.

    At a `site` only the training rows can end a run: nothing else is read there.
    """
    if config.dataset == NO_DATA:
        yield Finding(Mark.OK, "data", "none at the server")
        return
    yield from until_failure("data", _data(config, site))


def _data(config: RunConfig, site: bool) -> Iterator[Finding]:
    from fedbt_app.data import examples
    from fedbt_app.data.sources import readers
    from fedbt_app.data.survey import shared_texts, survey

    splits = {}
    for name, load in readers(config).items():
        try:
            splits[name] = survey(config, load(), name)
        except FedBTError as error:
            if not site or name == "train":
                raise
            yield Finding(Mark.WARNING, "data", f"not read at a site, and unreadable: {error}")
    rows = ", ".join(f"{name} {split.rows} rows" for name, split in splits.items())
    yield Finding(Mark.OK, "data", f"{examples.describe(config)}: {rows}")
    for name, split in splits.items():
        yield from _about_rows(name, split)
    for (first, second), count in shared_texts(splits).items():
        text = f"{count} texts of {first} are in {second}, too: scores on {second} are too good"
        yield Finding(Mark.WARNING, "data", text)
    yield from _about_text(config, splits, site)


def _about_rows(name: str, split: "Split") -> Iterator[Finding]:
    for note in split.notes:
        yield Finding(Mark.OK, "data", note)
    if split.dropped:
        text = f"{split.dropped} rows of {name} have no text and are dropped"
        yield Finding(Mark.WARNING, "data", text)
    if split.repeated:
        text = f"{split.repeated} rows of {name} repeat the text of an earlier one"
        yield Finding(Mark.WARNING, "data", text)


def _about_text(config: RunConfig, splits: Mapping[str, "Split"], site: bool) -> Iterator[Finding]:
    """Tell labels and lengths, which take a tokenizer: also one that does not fit the model."""
    from fedbt_app.data import examples
    from fedbt_app.data.survey import QUARTERS, length_quartiles

    try:
        checkpoint = _checkpoint(config)
        tokenizer = checkpoint.load_tokenizer()
    except FedBTError:
        yield Finding(Mark.WARNING, "data", "labels and lengths need the model's tokenizer")
        return
    if site or "train" in splits:
        found = examples.client_data(config, lambda: tokenizer, checkpoint.tokenizer_id, None)
        counts, fit = found.label_counts, found.fit
    else:  # a server's test set
        test = examples.test_data(config, lambda: tokenizer, checkpoint.tokenizer_id)
        counts, fit = TASKS[config.task].label_counts([test.examples]), test.fit
    if counts:
        yield Finding(Mark.OK, "data", f"{len(counts)} labels: {_listed(counts)}")
    for name, split in splits.items():
        lengths = length_quartiles(config, tokenizer, split)
        text = ", ".join(f"{length} ({at} %)" for at, length in zip(QUARTERS, lengths, strict=True))
        yield Finding(Mark.OK, "data", f"word pieces of a row of {name}: {text}")
    yield from _about_fit(config, fit)


def _about_fit(config: RunConfig, fit: "Fit") -> Iterator[Finding]:
    unknown = f"{100 * fit.unknown_share:.1f} % of the word pieces are [UNK]"
    yield Finding(Mark.OK, "data", f"at max-length {config.max_length}: {fit}; {unknown}")
    yield from warned("data", fit.warnings)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _columns(config: RunConfig) -> Iterator[Finding]:
    """Say how many columns stay unread; their names may be cells and are not shown."""
    from fedbt_app.data.survey import unread

    found = unread(config)
    if found is None:
        return
    text = f"{found.columns} columns, {found.unread} of them not read"
    if found.identifiers:
        text += f"; {found.identifiers} look like identifiers, which stay here"
    yield Finding(Mark.OK, "data", text)


# What leaves --------------------------------------------------------------------------------------


def leaving(config: RunConfig) -> dict[str, Any]:
    """Return all that the site would answer to the server's query, by field.

    Raises
    ------
    FedBTError
        When it would answer with this refusal instead.
    """
    from fedbt_app.client.client import Client

    node = {"data-path": config.dataset, "name": "(the node's name)"}
    client = Client(config.values(), node)
    client.checkpoint.check_length(config.max_length)
    return asdict(client.offer(held={}))


def check_site(path: Path, config: RunConfig) -> int:
    """Print what is found at a site and what would leave it; 1 when it would be refused."""
    if not path.exists():
        raise FedBTError(f"no such file: {path}; give the path of a file or folder that exists")
    for finding in examine(config):
        print(finding)
    try:
        fields = leaving(config)
    except FedBTError as error:
        reason = without_folders(str(error))
        print(f"This site would be refused, and this line would leave it: {reason}")
        return 1
    print("If this site joins, this leaves it, and then what its rounds train, cost and score:")
    for name, value in fields.items():
        print(f"  {name}: {value}")
    return 0
