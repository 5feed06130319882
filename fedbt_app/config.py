"""RunConfig: every setting of a run, typed and checked before anything starts.

A setting's default, type, bounds and sentence stand here, in its field, and nowhere else. Flower
lets a run override only the keys that pyproject.toml lists, so `make docs` writes that table, and
docs/config.md, from here.
"""

import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from fedbt_app.aggregation import OPTIMIZERS, RULES
from fedbt_app.choices import made
from fedbt_app.codec.formats import CODECS
from fedbt_app.errors import FedBTError
from fedbt_app.plan import AUTO, DEPTH_METHODS, METHODS, RunPlan
from fedbt_app.privacy import mechanisms
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.labels import clean

APP_DIR = Path(__file__).resolve().parent.parent  # a checkout, or where the wheel was unpacked
PARTITIONERS = ("iid", "dirichlet", "size-skewed", "natural")
NODE_KEYS = (  # that a node may set for itself, by the same name
    "local-depth",
    "device",
    "cache-dir",
    "pool-dir",
    "text-column",
    "label-column",
    "tokens-column",
    "tags-column",
    "label-map",
    "labels-allowed",
)
EMBEDDED = "embedded"
NO_DATA = "none"
# More, or longer, labels are text that stands in the wrong column.
MOST_LABELS = 5000
LONGEST_LABEL = 100  # characters


def key(
    default: bool | int | float | str,
    doc: str,
    choices: Collection[str] = (),
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Declare one config key: its default, its text for docs/config.md and its bounds."""
    bounds = {"choices": choices, "at_least": at_least, "at_most": at_most}
    return field(default=default, metadata={"doc": doc} | bounds)


@dataclass(frozen=True)
class RunConfig:
    """What one run does. Field `local_epochs` is the key `local-epochs`."""

    task: str = key("classification", "What is trained.", TASKS)
    method: str = key(
        "fedbt", "What clients train and exchange; one row of the table in plan.py.", METHODS
    )
    schedule: str = key(
        AUTO,
        "Blocks that each round trains (fedbt, fedbt-lora): `paper`, the published order; `auto`, the same above "
        "6 blocks, and up to 6 what our own measurements chose (docs/methods.md); or your own: rounds parted by `;`, "
        "blocks by `,`, negative ones counted from the top, begun again when it ends. `-1; -2,-1` trains the last "
        "block, then the last two.",
    )
    model: str = key(
        EMBEDDED,
        "Base encoder: `embedded`, a hub id or a folder. Any checkpoint of model type bert. A node's `model-path` "
        "wins.",
    )
    dataset: str = key(
        EMBEDDED,
        "`embedded`, a hub id, a file, or a folder of files named train, validation and test, of notes, or of a "
        "data set on disk (docs/data.md has the kinds); `none` for a server without data, where every node has a "
        "data-path. A node's `data-path` wins.",
    )
    dataset_subset: str = key("", "Configuration name of a hub data set; empty for none.")
    text_column: str = key(
        "text", "Column with the text (mlm, classification); `text` in a .txt file."
    )
    label_column: str = key(
        "label", "Column with the class (classification, and dirichlet partitions of mlm)."
    )
    tokens_column: str = key("tokens", "Column with the list of words (ner).")
    tags_column: str = key("ner_tags", "Column with the tags, one a word (ner).")
    labels: str = key(
        "",
        "Comma-separated label names, in order (ner: the tags, `O,B-x,I-x`; names of tags that are numbers); empty "
        "merges what the clients report and the central test set has.",
    )
    label_map: str = key(
        "",
        "Labels to write otherwise before anything leaves a site (ner: entity types), parted by `;`: "
        "`Heart=heart;renal failure=kidney`. A node's `label-map` wins.",
    )
    labels_allowed: str = key(
        "",
        "Comma-separated: the only label names that may leave a site (ner: entity types or tags); data with any other "
        "is refused there, without quoting it. Empty, and without `labels`, refuses what looks like text, persons or "
        "records (docs/your-data.md). A node's `labels-allowed` wins.",
    )
    max_length: int = key(
        64, "Longest sequence in word pieces, [CLS] and [SEP] included.", at_least=8, at_most=512
    )
    max_train_examples: int = key(
        0, "Use at most so many training rows (seeded choice); 0 for all.", at_least=0
    )
    max_test_examples: int = key(
        1000, "Use at most so many rows of the central test set; 0 for all.", at_least=0
    )
    test_fraction: float = key(
        0.1,
        "Share of the rows set apart for testing when the data has neither test nor validation.",
        at_least=0,
        at_most=0.9,
    )
    heldout_fraction: float = key(
        0.1, "Share of a client's rows kept for its own evaluation.", at_least=0, at_most=0.9
    )
    partitioner: str = key(
        "dirichlet",
        "How a simulation splits the rows over its clients; dirichlet skews labels (ner: entity types).",
        PARTITIONERS,
    )
    dirichlet_alpha: float = key(
        0.5, "Concentration of the label skew: small is more skewed.", at_least=1e-3
    )
    partition_weights: str = key("", "Relative client sizes for `size-skewed`, e.g. `1,3,6,6,3,1`.")
    partition_column: str = key("", "Column that names the site, for `natural`.")
    num_rounds: int = key(6, "Federated rounds.", at_least=1)
    local_epochs: int = key(1, "Passes over a client's rows in one round.", at_least=1)
    local_depth: int = key(
        0,
        "Blocks L_k of a client's model; 0 for the default: half the depth for the published order of mlm (all of up "
        "to 6 blocks with schedule=auto), all of it for the rest. A node's `local-depth` wins.",
        at_least=0,
    )
    batch_size: int = key(16, "Examples in a step.", at_least=1)
    tokens_per_batch: int = key(
        0, "Most padded word pieces in a step; 0 for no limit beside batch-size.", at_least=0
    )
    micro_batch_size: int = key(
        0, "Examples that run at once, gradients added up; 0 for the whole batch.", at_least=0
    )
    checkpointing: bool = key(
        False, "Save memory: keep only the inputs of trained blocks and run them again backwards."
    )
    learning_rate: float = key(
        5e-4, "AdamW step size; of the first round, where it falls.", at_least=0
    )
    learning_rate_decay: str = key(
        "none",
        "How the step size falls from round to round: `none`, or `linear` to 1 / num-rounds of it in the last one.",
        ("none", "linear"),
    )
    weight_decay: float = key(0.01, "AdamW weight decay, on matrices only.", at_least=0)
    dropout: float = key(
        0.1,
        "Dropout in trained blocks and the head; frozen blocks have none.",
        at_least=0,
        at_most=0.9,
    )
    mask_probability: float = key(
        0.15, "Share of word pieces to predict (mlm).", at_least=0.01, at_most=0.9
    )
    masking: str = key(
        "dynamic",
        "`dynamic` masks anew each epoch; `static` has static-maskings fixed ones, one a round in turn, so that the "
        "output of frozen blocks can be kept where every round trains above them (mlm).",
        ("dynamic", "static"),
    )
    static_maskings: int = key(4, "Fixed maskings of each row with masking=static.", at_least=1)
    lora_rank: int = key(8, "Rank of the adapters (lora, fedbt-lora).", at_least=1)
    lora_alpha: float = key(16.0, "Scale of the adapters: alpha / rank.", at_least=0)
    aggregation: str = key(
        "mean", "How a round's deltas become one: `mean`, weighted by examples (FedAvg)."
    )
    server_optimizer: str = key(
        "momentum",
        "What the server makes of that: `momentum` adds server-momentum times a part's last step to its next one "
        "(FedAvgM); with none it is FedAvg.",
    )
    privacy: str = key(
        "",
        "Mechanisms that treat each client's deltas before they are encoded there and after they are decoded on the "
        "server: names with commas, in order, or empty. None ships with this version (CONTRIBUTING.md says how to add "
        "one).",
    )
    server_momentum: float = key(
        0.0,
        "Share of a part's last step that the server adds to its next one (FedAvgM); nothing more is computed on the "
        "clients or sent.",
        at_least=0,
        at_most=0.99,
    )
    participation: float = key(
        1.0, "Share of the connected clients asked in a round.", at_least=1e-6, at_most=1
    )
    min_clients: int = key(2, "Clients that must be connected before the run starts.", at_least=1)
    min_replies: int = key(
        1,
        "Usable replies that a round needs; also the fewest clients asked in a round.",
        at_least=1,
    )
    below_minimum: str = key(
        "stop",
        "What becomes of a round with fewer than min-replies: `stop` ends the run, which can be resumed; `repeat` does "
        "the round again, three times at most, then stops.",
        ("stop", "repeat"),
    )
    round_timeout: float = key(3600.0, "Seconds to wait for clients in one round.", at_least=1)
    client_evaluation: str = key(
        "final", "When clients evaluate on their held-out rows.", ("never", "final", "every")
    )
    central_evaluation: str = key(
        "every",
        "When the server evaluates on the central test set: `every` round, or before the first and after the last "
        "(`final`).",
        ("final", "every"),
    )
    precision: str = key(
        "auto",
        "Matrix products in bfloat16 or float32; `auto` takes bfloat16 where the hardware is faster at it.",
        ("auto", "float32", "bf16"),
    )
    prefix_cache_gb: float = key(
        8.0,
        "Disk that a client may use to keep the frozen blocks' output for its rows; 0 computes it again each epoch.",
        at_least=0,
    )
    codec: str = key(
        "int2+zstd",
        "Number format of the deltas, both ways; `+zstd` compresses them on top, without loss.",
        tuple(CODECS),
    )
    reference: str = key(
        "", "Folder of a finished method=full run to compare with; empty predicts its costs."
    )
    seed: int = key(7, "Seeds partition, sampling, masking, dropout and new tensors.", at_least=0)
    device: str = key("auto", "`auto`, `cpu`, `cuda` or `cuda:1`; a node's `device` wins.")
    output_dir: str = key("runs/latest", "Folder for the report, the plots and the exported model.")
    tensorboard: bool = key(
        False,
        "Write each round's metrics and costs for TensorBoard too, into `tensorboard/` of the output folder.",
    )
    resume: str = key(
        "",
        "Output folder of a stopped run, to go on with it there and with the settings it had; empty for a new run.",
    )
    cache_dir: str = key(
        "", "Folder for tokenised data; empty for ~/.cache/fedbt. A node's `cache-dir` wins."
    )
    pool_dir: str = key(
        "",
        "Folder for the clients' parameter pools; empty for the cache folder. A node's `pool-dir` wins.",
    )

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        for spec in fields(self):
            _check_bounds(spec, getattr(self, spec.name))
        self._check_partition()
        self._check_labels()
        made(RULES, self.aggregation, self)
        made(OPTIMIZERS, self.server_optimizer, self)
        mechanisms(self)
        if self.min_replies > self.min_clients:
            raise FedBTError(
                f"min-replies={self.min_replies} is more than min-clients={self.min_clients}: raise min-clients, so "
                "that the run waits for as many clients as a round needs"
            )
        self._check_depth()
        for name in ("model", "dataset", "output_dir"):
            if not getattr(self, name).strip():
                raise FedBTError(
                    f"{_dashed(name)} is empty: give a value, or drop it to use the default"
                )

    def _check_partition(self) -> None:
        if self.partitioner == "natural" and not self.partition_column:
            raise FedBTError(
                "partitioner=natural needs partition-column: name the column that holds the site"
            )
        if self.partition_column and self.partitioner != "natural":
            raise FedBTError(
                "partition-column is only used by partitioner=natural: set that or drop the column"
            )
        if self.partitioner == "size-skewed" and not self.partition_weights:
            raise FedBTError(
                "partitioner=size-skewed needs partition-weights, for example partition-weights=1,3,6"
            )
        if self.partition_weights and self.partitioner != "size-skewed":
            raise FedBTError(
                "partition-weights is only used by partitioner=size-skewed: set that or drop the weights"
            )

    def _check_labels(self) -> None:
        if len(set(self.label_names)) < len(self.label_names):
            raise FedBTError(f"labels={self.labels} names a label twice: name each once")
        if self.labels and not TASKS[self.task].label_key:
            raise FedBTError(
                f"labels is set but task={self.task} has none: drop labels or choose another task"
            )
        renamed = set()
        # no entry is quoted: a node's own are labels of its data
        for number, (old, _, new) in enumerate(self._label_map_entries, start=1):
            if not clean(old) or not clean(new):
                raise FedBTError(
                    f"entry {number} of label-map is not old=new: write for example Heart=heart;Lung=lung"
                )
            if clean(old) in renamed:
                raise FedBTError(
                    f"entry {number} of label-map renames a label a second time: keep one of the two"
                )
            renamed.add(clean(old))

    def _check_depth(self) -> None:
        if self.local_depth and self.method not in DEPTH_METHODS:
            raise FedBTError(
                f"local-depth is set but method={self.method} trains the whole depth: use local-depth=0"
            )
        if self.schedule != AUTO and self.method not in DEPTH_METHODS:
            raise FedBTError(
                f"schedule is set but method={self.method} has none: use schedule=auto, or method=fedbt"
            )

    @property
    def label_names(self) -> tuple[str, ...]:
        """The configured labels; empty when the clients' are to be merged."""
        return _names(self.labels)

    @property
    def allowed_names(self) -> tuple[str, ...]:
        """The only label names that may leave a site; empty where nobody has listed them."""
        return _names(self.labels_allowed)

    @property
    def label_renames(self) -> dict[str, str]:
        """The labels to write otherwise: old -> new."""
        return {clean(old): clean(new) for old, _, new in self._label_map_entries}

    @property
    def _label_map_entries(self) -> list[tuple[str, str, str]]:
        return [entry.partition("=") for entry in self.label_map.split(";") if entry.strip()]

    def learning_rate_in(self, round_: int) -> float:
        """Step size of a round, counted from 0."""
        if self.learning_rate_decay == "none":
            return self.learning_rate
        left = 1 - round_ / self.num_rounds
        return self.learning_rate * left

    @property
    def fixed_versions(self) -> int:
        """How many versions of a row take turns, one a round; 0: each epoch makes its own (mlm)."""
        return TASKS[self.task].versions(self)

    def plan(self, depth: int) -> RunPlan:
        """Return what the run trains of `depth` blocks; FedBTError if the schedule does not fit."""
        return RunPlan(
            method=METHODS[self.method],
            task=TASKS[self.task],
            depth=depth,
            num_rounds=self.num_rounds,
            schedule=self.schedule,
            seed=self.seed,
        )

    @property
    def output_folder(self) -> Path:
        """Where results go; a resumed run stays in its folder."""
        return Path(self.resume or self.output_dir).expanduser()

    @property
    def cache_folder(self) -> Path:
        """Where tokenised data goes."""
        if not self.cache_dir:
            return default_cache_folder()
        return Path(self.cache_dir).expanduser()

    @property
    def pool_folder(self) -> Path:
        """Where parameter pools go."""
        if not self.pool_dir:
            return self.cache_folder / "pools"
        return Path(self.pool_dir).expanduser()

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Build from dashed keys, all of which must be given.

        Raises
        ------
        FedBTError
            For an unknown, missing or badly typed key, or contradictory settings.
        """
        specs = {_dashed(spec.name): spec for spec in fields(cls)}
        for name in values:
            if name not in specs:
                raise FedBTError(
                    f"unknown config key {name!r}{_nearest(name, specs)}; docs/config.md lists them all"
                )
        for name in specs:
            if name not in values:
                raise FedBTError(
                    f"config key {name!r} is missing: give every key that docs/config.md lists"
                )
        typed = {spec.name: _typed(name, spec, values[name]) for name, spec in specs.items()}
        return cls(**typed)

    def values(self) -> dict[str, Any]:
        """Return every setting by its dashed key."""
        return {_dashed(spec.name): getattr(self, spec.name) for spec in fields(self)}

    def with_node(self, node: Mapping[str, Any]) -> "RunConfig":
        """Return this run as one node sees it: the node's own settings win over the run's.

        Recognised node keys: `data-path`, `model-path` and those of NODE_KEYS.
        """
        own = {"data-path": "dataset", "model-path": "model"}
        own |= {name: name.replace("-", "_") for name in NODE_KEYS}
        specs = {spec.name: spec for spec in fields(self)}
        values = {name: getattr(self, name) for name in specs}
        if self.method not in DEPTH_METHODS:
            own.pop("local-depth")  # baselines on the same nodes train the whole depth
        for name, target in own.items():
            if name in node:
                values[target] = _typed(f"node config {name}", specs[target], node[name])
        return RunConfig(**values)


def default_cache_folder() -> Path:
    """Where a user's FedBT keeps what it can make again."""
    return Path.home() / ".cache" / "fedbt"


def defaults() -> dict[str, Any]:
    """Return the default of every setting, by dashed key."""
    return {_dashed(spec.name): spec.default for spec in fields(RunConfig)}


def parse_assignment(text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE`; the value is TOML where it parses, else the plain string."""
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise FedBTError(f"{text!r} is not KEY=VALUE: write for example num-rounds=10")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    if not isinstance(parsed, bool | int | float | str):
        parsed = value
    return name.strip(), parsed


def _names(listed: str) -> tuple[str, ...]:
    return tuple(filter(None, map(clean, listed.split(","))))


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    if not close:
        return ""
    return f" (did you mean {close[0]!r}?)"


def _typed(name: str, spec: "Field[Any]", value: Any) -> Any:
    wanted: Any = spec.type
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is str and type(value) in (int, float):  # labels=1, say, without quotes
        return str(value)
    if type(value) is not wanted:
        raise FedBTError(f"{name} must be {_WORDS[wanted]}, not {value!r}")
    return value


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _check_bounds(spec: "Field[Any]", value: Any) -> None:
    name = _dashed(spec.name)
    choices = spec.metadata["choices"]
    least = spec.metadata["at_least"]
    most = spec.metadata["at_most"]
    if choices and value not in choices:
        raise FedBTError(f"{name}={value} is not one of {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise FedBTError(f"{name}={value} is not a finite number: give one")
    if least is not None and value < least:
        raise FedBTError(f"{name}={value} is too small: it must be at least {least:g}")
    if most is not None and value > most:
        raise FedBTError(f"{name}={value} is too large: it may be at most {most:g}")
