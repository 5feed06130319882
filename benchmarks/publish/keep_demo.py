"""Keep what README shows of `make demo`: the two reports' scores and costs, and the plots of the
fine-tuning.

make demo && python -m benchmarks.publish.keep_demo
"""

import json
import shutil

from benchmarks.results import RESULTS, ROOT

KEPT = (
    "task",
    "seed",
    "initial",
    "final",
    "majority",
    "cost",
    "reference",
    "reference_same_flops",
    "ratio",
    "versions",
)


def main() -> None:
    """Read the reports in runs/ and write benchmarks/results/demo.json and docs/demo-*.png."""
    rows = []
    for name in ("pretrain", "finetune"):
        report = json.loads(
            (ROOT / "runs" / f"demo-{name}" / "report.json").read_text(encoding="utf-8")
        )
        counts = {
            "rounds": len(report["rounds"]),
            "clients": len(report["clients"]),
            "train_examples": report["config"]["max-train-examples"],
        }
        rows.append(counts | {key: report[key] for key in KEPT})
    (RESULTS / "demo.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for plot in ("cost", "metric"):
        shutil.copy(
            ROOT / "runs" / "demo-finetune" / f"{plot}.png", ROOT / "docs" / f"demo-{plot}.png"
        )


if __name__ == "__main__":
    main()
