"""The pieces that every page is made of: look, sections, pictures, settings; one HTML file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import yaml

from laplace_ws.report.style import Picture

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p { margin: .4rem 0; max-width: 60rem; }
.about, figcaption, .note { color: #555; font-size: .88rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid #d55e00; padding: .3rem 0 .3rem .8rem; margin: 1rem 0; }
.warning { border-left: 4px solid #e69f00; padding: .2rem 0 .2rem .8rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
thead th { vertical-align: bottom; font-weight: 600; white-space: normal; border-bottom: 2px solid #999; }
th small, td small { display: block; font-weight: 400; color: #555; white-space: nowrap; }
tbody th { font-weight: 400; text-align: left; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.tuned, tr.tuned th:first-child { background: #fdf1e9; }
.pictures { display: grid; gap: 1rem; align-items: start; }
.three { grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.two { grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(min(15.5rem, 100%), 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 36rem; height: auto; margin: 0 auto; }
.small figure img { max-width: 22rem; }
pre { background: #f6f6f6; padding: .8rem; font-size: .84rem; line-height: 1.45; overflow-x: auto; }
.sources { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
summary { cursor: pointer; margin: .8rem 0 .4rem; }
"""


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page; empty sections are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading with what follows it; nothing where all parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def picture_grid(pictures: Iterable[Picture], layout: str) -> str:
    """Pictures side by side; `layout` is a class of the style sheet: "three", "two" or "small"."""
    figures = "".join(_figure(picture) for picture in pictures)
    return f'<div class="pictures {layout}">{figures}</div>' if figures else ""


def yaml_blocks(blocks: Mapping[str, Mapping[str, Any]]) -> str:
    """Settings by heading, side by side, as they would stand in a YAML file."""
    return f'<div class="sources">{"".join(_yaml_block(title, values) for title, values in blocks.items())}</div>'


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader expects."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.svg).decode("ascii")
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f'<figure><img alt="{escape(picture.alt)}" src="data:image/svg+xml;base64,{data}">{caption}</figure>\n'


def _yaml_block(title: str, values: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return f"<div><h3>{escape(title)}</h3><pre>{escape(text)}</pre></div>"
