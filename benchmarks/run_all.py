"""Runs every benchmark, keeps its JSON in build/bench/, updates the tables of docs/ and README.

`ptq` comes first: `verify` and `latency` reuse what it quantized. A script that fails does not stop
the others.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import common

SCRIPTS = (
    *("lowering", "import_accuracy", "ptq", "verify", "latency", "few_bits", "first_run"),
    *("folded", "tasks", "pruning", "smaller"),
    *("import_zoo", "coupled_channels", "quantize_zoo", "damaged_files", "fuzz_readers", "faults"),
    *("synthesis_speed", "synthesis_quality"),
    *("best_ablation", "dsg_ablation", "reconstruction", "rounding_ablation"),
    *("reconstruction_reference", "reconstruction_speed", "reconstruction_memory"),
    "stages_ablation",
    *("mixed_precision", "trust", "scaling"),
    *("training", "training_reference", "transfer"),
)
RUNS: dict[str, tuple[str, ...]] = {name: (name,) for name in SCRIPTS} | {
    "synthesis_quality": (
        *("synthesis_quality", "--networks", "resnet20", "--seeds", "0,1,2"),
        *("--seconds", "40", "--limit", "4000"),
    ),
    "reconstruction": ("reconstruction", "--reconstructions", "nearest,closed_form"),
    "reconstruction_shortcuts": (
        *("reconstruction", "--images", "best_unlabelled", "--image-steps", "100"),
        *("--reconstructions", "best", "--steps", "1000", "--seeds", "0,1,2"),
        *("--layers", "brecq_8bit_ends_second_shortcuts", "--table", "reconstruction_shortcuts"),
    ),
    "reconstruction_large": (
        *("reconstruction", "--networks", "efficientnet_lite0", "--n", "128"),
        *("--images", "best_unlabelled", "--image-steps", "60"),
        *("--reconstructions", "closed_form", "--schemes", "w8a8,w4a8,w4a4"),
        *("--layers", "qdrop_8bit_ends", "--table", "reconstruction_large"),
    ),
    "reconstruction_genie": (
        *("reconstruction", "--images", "genie", "--image-steps", "500"),
        *("--reconstructions", "genie_m", "--steps", "2000", "--table", "reconstruction_genie"),
        *("--layers", "brecq_8bit_ends_second_shortcuts"),
    ),
    "synthesis_quality_long": (
        *("synthesis_quality", "--networks", "resnet20", "--seeds", "0", "--seconds", "200"),
        *("--limit", "4000", "--table", "synthesis_quality_long", "--methods"),
        "real,best,best-third,zeroq,dsg,genie,deepinversion",
    ),
    "synthesis_quality_large": (
        *("synthesis_quality", "--networks", "efficientnet_lite0", "--n", "64"),
        *("--seconds", "90", "--table", "synthesis_quality_large"),
        *(
            "--methods",
            "real,best,best-third,zeroq,dsg,genie,deepinversion,intraq,mct,noise,gaussian",
        ),
    ),
    "synthesis_quality_large_256": (
        *("synthesis_quality", "--networks", "efficientnet_lite0", "--n", "256"),
        *("--seconds", "360", "--table", "synthesis_quality_large_256"),
        *("--methods", "real,best,zeroq,dsg"),
    ),
    "synthesis_quality_large_long": (
        *("synthesis_quality", "--networks", "efficientnet_lite0", "--n", "64"),
        *("--seconds", "300", "--table", "synthesis_quality_large_long"),
        *("--methods", "best,zeroq,dsg"),
    ),
    "faults": ("faults", "--long"),
    "best_ablation": ("best_ablation", "--limit", "4000"),
    "mixed_precision": ("mixed_precision", "--seeds", "0,1,2", "--limit", "4000"),
    "mixed_precision_all": (
        *("mixed_precision", "--layers", "zsq_all_low", "--method", "best_unlabelled"),
        *("--steps", "60", "--budgets", "4.0bits", "--table", "mixed_precision_all"),
    ),
    "dsg_ablation": ("dsg_ablation", "--seeds", "0,1,2", "--steps", "100", "--limit", "4000"),
}
"""{name of a result file: script and arguments}."""


def main() -> None:
    """Runs the chosen scripts, each in a new process."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = common.choices(RUNS)
    parser.add_argument("--only", type=known, default=tuple(RUNS), help=", ".join(RUNS))
    parser.add_argument("--shared", type=Path, default=common.SHARED, help="development data")
    args = parser.parse_args()
    common.BUILD.mkdir(parents=True, exist_ok=True)
    failed = [name for name in args.only if not succeeded(name, args.shared)]
    subprocess.run([sys.executable, beside("update_results")], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def beside(name: str) -> str:
    """The path of another script."""
    return str(Path(__file__).with_name(f"{name}.py"))


def succeeded(name: str, shared: Path) -> bool:
    """Runs one script; its result replaces the last one only if it comes to an end."""
    common.log(f"== {name}")
    start = time.perf_counter()
    script, *arguments = RUNS[name]
    line = [sys.executable, beside(script), *arguments, "--json", "--shared", str(shared)]
    ran = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    common.log(f"== {name}: exit {ran.returncode} after {time.perf_counter() - start:.0f} s")
    if ran.returncode == 0:
        (common.BUILD / f"{name}.json").write_text(ran.stdout, encoding="utf-8")
    return ran.returncode == 0


if __name__ == "__main__":
    main()
