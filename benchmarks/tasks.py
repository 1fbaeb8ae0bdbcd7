"""Networks beyond classifiers, quantized without data and judged on labels in ONNX Runtime.

Every task first reproduces the float figure; then `dfq quantize` writes a file, which is judged as
it runs. Scores are computed here: PSNR of luma, SSIM, mean average precision by COCO's rule,
cosine, perplexity and right answers of a probe.
"""

import common
import tasks_detection
import tasks_encoder
import tasks_faces
import tasks_images
import tasks_language
from common import Column, Row
from task_runs import FIRST, LAST, Asked, Task

TASKS: dict[str, Task] = {
    "images": tasks_images.TASK,
    "detection": tasks_detection.TASK,
    "faces": tasks_faces.TASK,
    "language": tasks_language.TASK,
    "encoder": tasks_encoder.TASK,
}
TABLES: dict[str, tuple[Column, ...]] = {
    f"tasks_{name}": (*FIRST, *task.columns, *LAST) for name, task in TASKS.items()
}


def main() -> None:
    """Measures the chosen tasks."""
    parser = common.parser(__doc__)
    parser.add_argument("--tasks", type=common.choices(TASKS), default=tuple(TASKS))
    parser.add_argument("--schemes", type=common.names, default=(), help="default: of the task")
    parser.add_argument("--presets", type=common.names, default=("fast", "balanced"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="judge by so many examples only")
    args = parser.parse_args()
    asked = Asked(args.shared, args.schemes, args.presets, args.seed, args.limit)
    rows: list[Row] = []
    reasons = []
    for name in args.tasks:
        task = TASKS[name]
        if missing := common.absent(args.shared, *task.needs):
            reasons.append(missing)
            continue
        for row in task.rows(asked):
            rows.append({"table": f"tasks_{name}", **row})
            common.logged(row, TABLES[f"tasks_{name}"])
    common.finish(args, TABLES, rows, "; ".join(dict.fromkeys(reasons)) or None)


if __name__ == "__main__":
    main()
