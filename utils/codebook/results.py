"""The files that test.py leaves in its results folder, and its lines on the screen."""

from __future__ import annotations

import shutil
from pathlib import Path

from modules import Autoencoder
from utils.charts import save_figure
from utils.codebook.codes.files import CodeFile, file_rate
from utils.codebook.plots import draw_all
from utils.codebook.reconstruct import CODES, Findings
from utils.evaluation import schema
from utils.evaluation.results import print_rows, rate_of, remove_results
from utils.evaluation.schema import Analysis, Rate
from utils.files import inside, writable_folder
from utils.images import save_comparison
from utils.logger import log
from utils.report import write_report

PICTURES = ("reconstructions.png", "usage.png", "slots.png", "codebook.png")


def results_folder(output: str, model_name: str) -> Path:
    """Create <output>/results/<model_name>. Raises UserError if that is not possible."""
    folder = inside(Path(output) / "results", model_name, "--model_name")
    return writable_folder(folder, "--output_folder")


def write_results(results: Path, model: Autoencoder, found: Findings, analysis: Analysis) -> None:
    """Replace everything in the folder but original/ and rec/, and print what there is."""
    remove_results(results)
    save_comparison(results / "reconstructions.png", found.shown[:, 0], found.shown[:, 1])
    for name, figure in draw_all(found.statistics, model.quantizer.codebook).items():
        save_figure(results / f"{name}.png", figure)
    schema.write(results / "analysis.json", analysis)
    write_report(results)
    rate, codebook, skipped = analysis.rate, analysis.codebook, analysis.skipped_images.count
    rows = {
        "images": f"{codebook.images}",
        **({"skipped images": f"{skipped}"} if skipped else {}),
        **(codebook.rows() | rate.rows() if rate else {"rate": "not quantised"}),
    }
    drawn = [name for name in PICTURES if (results / name).exists()]
    codes = [CODES] if rate.coded_bytes is not None else []
    files = ["original", "rec", *drawn, *codes, "analysis.json", "report.html"]
    print_rows(rows, [results / name for name in files])


def update_results(results: Path, codes: CodeFile, same: bool) -> None:
    """Remove what does not belong to the pictures made from these codes, and renew the report.

    same: whether the pictures are those of the run that saved the codes.
    """
    remove_results(results)
    if not saved_by_last_test(results, codes.path):
        names = ("original", "analysis.json", *PICTURES)
        left = [results / name for name in names if (results / name).exists()]
        if left:
            removed = ", ".join(path.name for path in left)
            log.warning("removed %s: their test did not save these codes", removed)
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (results / "report.html").exists():
        write_report(results)
    if not same:
        log.warning(
            "some pixels differ from those of the run that saved the codes: "
            "another device or version of PyTorch rounds differently"
        )
    rows = {
        "images": f"{codes.info.num_coded}",
        **Rate(**file_rate(codes.path, codes.info)).rows(),
        "same as when saved": "bit for bit" if same else "no",
    }
    print_rows(rows, [results / "rec"])


def saved_by_last_test(results: Path, codes: Path) -> bool:
    """Return whether the last test with these results saved these codes."""
    own, rate = results / CODES, rate_of(results / "rec") or Rate()
    if not own.is_file() or rate.coded_bits_per_pixel is None:
        return False
    return own.samefile(codes) or own.read_bytes() == codes.read_bytes()
