"""Keep what README shows of `make demo`: both reports' scores and costs, the fine-tuning's plots.

    make demo && python -m benchmarks.publish.keep_demo

It writes benchmarks/results/demo.json and docs/demo-*.png.
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
    """Read the reports in runs/ and keep what is shown of them."""
    rows = []
    for name in ("pretrain", "finetune"):
        path = ROOT / "runs" / f"demo-{name}" / "report.json"
        report = json.loads(path.read_text(encoding="utf-8"))
        counts = {
            "rounds": len(report["rounds"]),
            "clients": len(report["clients"]),
            "train_examples": report["config"]["max-train-examples"],
        }
        rows.append(counts | {key: report[key] for key in KEPT})
    text = json.dumps(rows, indent=1) + "\n"
    (RESULTS / "demo.json").write_text(text, encoding="utf-8")
    for plot in ("cost", "metric"):
        drawn = ROOT / "runs" / "demo-finetune" / f"{plot}.png"
        shutil.copy(drawn, ROOT / "docs" / f"demo-{plot}.png")


if __name__ == "__main__":
    main()
