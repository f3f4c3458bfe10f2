"""Write docs/demo.png, the README's picture, from a run of the demo.

python tools/demo_picture.py runs/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from selective_dpo.evaluation.results import main_measure
from selective_dpo.report.content import load_report_content
from selective_dpo.report.figures import draw_arms, draw_difficulty, new_figure, report_style

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "demo.png"


def main(run: str) -> None:
    """Histogram and win rates side by side."""
    content = load_report_content(Path(run))
    measure = content.results and main_measure(content.results)
    if not (content.results and measure):
        sys.exit(f"{run} has no evaluation")
    with report_style():
        figure, axes = new_figure(3.9, columns=2)
        figure.set_size_inches(11.5, 3.9)
        draw_difficulty(axes[0], content)
        draw_arms(axes[1], content.results, measure)
        figure.savefig(PICTURE, dpi=160, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
