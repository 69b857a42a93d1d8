"""HTML as a tree: whatever comes from a file is text in it, never markup."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterable, Sequence

import matplotlib
from matplotlib.figure import Figure

Child = ET.Element | str | None


def element(tag: str, *children: Child | Iterable[Child], **attributes: str) -> ET.Element:
    """An element with these children, texts among them, and attributes (`class_` is `class`)."""
    made = ET.Element(
        tag, {name.rstrip("_").replace("_", "-"): _clean(v) for name, v in attributes.items()}
    )
    for child in children:
        if child is None:
            continue
        if isinstance(child, ET.Element):
            made.append(child)
        elif isinstance(child, str):
            if len(made):
                made[-1].tail = (made[-1].tail or "") + _clean(child)
            else:
                made.text = (made.text or "") + _clean(child)
        else:
            for one in child:
                if isinstance(one, str):
                    raise TypeError("Texts are children, not lists of children.")
                if one is not None:
                    made.append(one)
    return made


def document(root: ET.Element) -> str:
    """The text of a page."""
    return "<!DOCTYPE html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"


def table(
    caption: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[Child]],
    numeric: Collection[str] = (),
) -> ET.Element:
    """A table in a box that scrolls sideways; the first entry of each row is its heading.

    **Arguments:**

    - `numeric`: the headings of columns that are aligned to the right.
    """
    kinds = ["number" if heading in numeric else "text" for heading in headings]
    head = [
        element("th", heading, scope="col", class_=kind)
        for heading, kind in zip(headings, kinds, strict=True)
    ]
    body = []
    for first, *others in rows:
        cells = [element("th", first, scope="row")]
        cells += [
            element("td", cell, class_=kind) for cell, kind in zip(others, kinds[1:], strict=True)
        ]
        body.append(element("tr", cells))
    return scrolling(
        element(
            "table",
            # The caption of a wide table is no wider than the page.
            element("caption", element("span", caption)),
            element("thead", element("tr", head)),
            element("tbody", body),
        ),
        caption,
    )


def scrolling(child: ET.Element, name: str) -> ET.Element:
    """A box for what may be wider than the page; the keyboard scrolls it too."""
    return element("div", child, class_="scroll", role="region", tabindex="0", aria_label=name)


def details(summary: str, *children: Child) -> ET.Element:
    """What is shown when it is asked for."""
    return element("details", element("summary", summary), *children)


def figure(drawn: Figure, name: str, alt: str, caption: str) -> ET.Element:
    """A figure as inline SVG.

    **Arguments:**

    - `name`: different for each figure of a page: it stands in front of the figure's ids.
    - `alt`: what someone who does not see the figure is told.
    - `caption`: what stands below it.
    """
    svg = _svg(drawn, name, alt)
    return element("figure", scrolling(svg, alt), element("figcaption", caption))


def _svg(drawn: Figure, name: str, alt: str) -> ET.Element:
    buffer = io.BytesIO()
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}),
        warnings.catch_warnings(),
    ):
        # The browser has other fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for one in root.iter():
        one.tag = _local(one.tag)
        one.attrib = {
            _local(key): _own_ids(_local(key), value, name) for key, value in one.attrib.items()
        }
    width = drawn.get_figwidth()
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": _clean(alt),
        # Matplotlib's own style sheet would be that of the whole page.
        "style": f"stroke-linejoin: round; stroke-linecap: butt; width: {width:g}in; "
        f"min-width: {0.7 * width:g}in",
    }
    return root


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _own_ids(key: str, value: str, name: str) -> str:
    """The value of an attribute, ids in it made different from those of other figures."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    return re.sub(r"url\(#", f"url(#{name}-", value)


def _clean(text: str) -> str:
    """Without control characters and halves of characters, which no page may hold."""
    return "".join(
        sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text
    )
