"""The page of a comparison: the ranking, its picture, and how to reproduce it."""

from __future__ import annotations

from html import escape
from pathlib import Path

from laplace_ws.report.html import document, duration, picture_grid, section, yaml_blocks
from laplace_ws.report.selection_figures import evidence_picture
from laplace_ws.selection.ranking import PAGE, Entry, Selection, correlation_sentence, load_selection


def write_selection_page(folder: Path) -> Path:
    """Write `folder/select.html` from `folder/select.json`.

    Args:
        folder: of a comparison that has finished.

    Returns:
        Path of the page, one file without links to others.

    Raises:
        ReportInputError: select.json is missing or broken.
    """
    path = folder / PAGE
    path.write_text(render_selection(load_selection(folder)), encoding="utf-8")
    return path


def render_selection(selection: Selection) -> str:
    """The page as text."""
    sections = [_head(selection), section("Ranking", ranking_table(selection), _notes(selection))]
    if selection.ranking:
        sections.append(
            section("Log marginal likelihood and test NLL", picture_grid([evidence_picture(selection)], "two"))
        )
    sources = {
        "Configuration": selection.config,
        "Environment": selection.environment,
        "Data": selection.data,
    }
    sections.append(section("How to reproduce", yaml_blocks(sources)))
    return document(selection.name, sections)


def verdict(selection: Selection) -> str:
    """One sentence: whether the first by log marginal likelihood is the first by test NLL, and how far behind if not."""
    if not selection.ranking:
        return "No candidate has finished."
    first, best = selection.ranking[0], min(selection.ranking, key=lambda entry: entry.test_nll)
    if first is best:
        return f"{first.name} has the highest log marginal likelihood and the lowest test NLL ({first.test_nll:.3f})."
    place = sorted(selection.ranking, key=lambda entry: entry.test_nll).index(first) + 1
    return (
        f"{first.name} has the highest log marginal likelihood; by test NLL ({first.test_nll:.3f}) it comes {place} of "
        f"{len(selection.ranking)}, {first.test_nll - best.test_nll:.3f} behind {best.name} ({best.test_nll:.3f})."
    )


def ranking_table(selection: Selection) -> str:
    """One row per model, the highest log marginal likelihood first; the best value of a column in bold."""
    columns = (
        ("model", ""),
        ("architecture", ""),
        ("log marginal likelihood", "nats"),
        ("per example", "nats"),
        ("test NLL", "nats/example"),
        ("test accuracy", "%"),
        ("weights", ""),
        ("training time", "s"),
    )
    head = "".join(
        f'<th scope="col">{escape(title)}{f"<small>{escape(unit)}</small>" if unit else ""}</th>'
        for title, unit in columns
    )
    rows = [_row(selection, entry) for entry in selection.ranking]
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _row(selection: Selection, entry: Entry) -> str:
    lowest = min(other.test_nll for other in selection.ranking)
    highest = max(other.test_accuracy for other in selection.ranking)
    is_first = entry is selection.ranking[0]
    cells = [
        (entry.architecture, False),
        (f"{entry.log_marginal_likelihood:.1f}", is_first),
        (f"{selection.per_example(entry):.4f}", is_first),
        (f"{entry.test_nll:.4f}", entry.test_nll == lowest),
        (f"{100 * entry.test_accuracy:.2f}", entry.test_accuracy == highest),
        (f"{entry.n_weights:,}", False),
        (f"{entry.train_seconds:.1f}", False),
    ]
    body = "".join(f"<td>{f'<strong>{escape(text)}</strong>' if best else escape(text)}</td>" for text, best in cells)
    row_class = ' class="tuned"' if is_first else ""
    return f'<tr{row_class}><th scope="row">{escape(entry.name)}</th>{body}</tr>'


def _head(selection: Selection) -> str:
    about = [
        f"{selection.data['name']}",
        f"{selection.n_train:,} training examples",
        f"{selection.data['n_test']:,} test examples",
        f"{duration(selection.total_seconds)} in all",
    ]
    parts = [
        f"<h1>{escape(selection.name)}</h1>",
        f'<p class="about">{escape(" · ".join(about))}</p>',
        f'<p class="verdict">{escape(verdict(selection))}</p>',
    ]
    parts += [
        f'<p class="warning">Not ranked: {escape(name)}: {escape(reason)}</p>'
        for name, reason in selection.failed.items()
    ]
    return "\n".join(parts)


def _notes(selection: Selection) -> str:
    notes = [
        correlation_sentence(selection.correlation),
        "Best value of a column in bold. Each row is one training run, so small differences may be noise of the seed.",
    ]
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
