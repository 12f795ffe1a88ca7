"""The part of Quarto's Markdown that these pages use, as HTML: for the site that is built where there is no
Quarto.

Known here: headings with `{#id}`, pipe tables with `: caption {#tbl-id}`, images with `{#fig-id fig-
alt="..."}`, code blocks, `$math$` (what matplotlib's mathtext knows), fenced divs, callouts (`title`,
`collapse`), `[text]{.class}`, `[@key]` and `@key` from references.bib, `@fig-id`, `@tbl-id`, `@sec-id`, and
the shortcode `{{< fragment NAME >}}` of `_extensions/medaug`.
"""

import html
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import mistune
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from medaug import paths

FRAGMENT = re.compile(r"\{\{<\s*fragment\s+([\w-]+)\s*>\}\}")
NOTHING_YET = "*Nothing here yet: `make report` computes it (ten to thirteen minutes on two cores).*"
KINDS = {"fig": "Figure", "tbl": "Table", "sec": "Section"}


def real_path(site_path: str) -> Path:
    """Return the file behind a path of the site; `runs/...` lies where `paths.RUNS` says."""
    head, _, tail = site_path.partition("/")
    return paths.RUNS / tail if head == "runs" else paths.ROOT / site_path


def read_fragment(name: str) -> str:
    """Return the Markdown of a fragment: of the runs, else the published one, else a note that says how to
    make it.
    """
    for folder in (paths.RUNS / "report", paths.RESULTS / "report"):
        if (folder / f"{name}.md").exists():
            return (folder / f"{name}.md").read_text(encoding="utf-8")
    return NOTHING_YET


def insert_fragments(text: str) -> str:
    """Replace each `{{< fragment NAME >}}` in `text` by that fragment's Markdown."""
    return FRAGMENT.sub(lambda match: read_fragment(match[1]), text)


def locate(site_path: str) -> str | None:
    """Return `site_path`, or for a missing table or figure of a run the published copy, or None if neither is
    there.
    """
    if real_path(site_path).exists():
        return site_path
    match = re.match(r"runs/([^/]+)/(tables|figures)/(.+)$", site_path)
    if match:
        study, kind, name = match.groups()
        published = f"data/results/{study}/{name}" if kind == "tables" else f"figures/{study}/{name}"
        if real_path(published).exists():
            return published
    return None


def parse_attributes(text: str | None) -> dict[str, str]:
    """Return Quarto's `{#id .class key="value"}` as a dict with the keys `id`, `class` and the others."""
    found, classes = {}, []
    for identity, name, key, quoted, bare in re.findall(
        r'#([\w-]+)|\.([\w-]+)|([\w-]+)=(?:"([^"]*)"|([^\s"]+))', text or ""
    ):
        if identity:
            found["id"] = identity
        elif name:
            classes.append(name)
        else:
            found[key] = quoted or bare
    return {**found, "class": " ".join(classes)}


def read_bibliography(path: Path) -> dict[str, dict[str, str]]:
    """Return the entries of a BibTeX file with one field per line: key -> fields, braces removed."""
    entries = {}
    for key, body in re.findall(
        r"@\w+\{([\w-]+),\n(.*?)\n\}", path.read_text(encoding="utf-8"), flags=re.DOTALL
    ):
        fields = re.findall(r"^\s*(\w+) = \{(.*)\},?$", body, flags=re.MULTILINE)
        entries[key] = {name: re.sub(r"[{}\\]", "", value).replace("--", "–") for name, value in fields}
    return entries


def cite_short(entry: dict[str, str]) -> tuple[str, str]:
    """Return (authors, year) for the running text: one or two names, or the first and "et al."."""
    names = [name.split(",")[0].strip() for name in entry["author"].split(" and ")]
    authors = " and ".join(names) if len(names) <= 2 and "others" not in names else f"{names[0]} et al."
    return authors, entry["year"]


def format_reference(entry: dict[str, str]) -> str:
    """Return one entry of the list of references as HTML."""
    authors = entry["author"].replace(" and others", " et al.").replace(" and ", "; ")
    venue = entry.get("journal") or entry.get("booktitle") or entry.get("publisher") or ""
    where = ", ".join(
        part
        for part in (
            f"<em>{html.escape(venue)}</em>" if venue else "",
            entry.get("volume", ""),
            entry.get("pages", ""),
        )
        if part
    )
    url, label = "", ""
    if "doi" in entry:
        url, label = f"https://doi.org/{entry['doi']}", f"doi:{entry['doi']}"
    elif "eprint" in entry:
        url, label = f"https://arxiv.org/abs/{entry['eprint']}", f"arXiv:{entry['eprint']}"
    link = f' <a href="{url}">{html.escape(label)}</a>' if url else ""
    end = "" if entry["title"].endswith("?") else "."
    head = f"{html.escape(authors)} ({entry['year']}). {html.escape(entry['title'])}{end}"
    return f"{head} {where}{'.' if where else ''}{link}"


def render_math(tex: str, display: bool = False) -> str:
    """Return a formula as inline SVG in the colour of the text (so it needs no network); as code if it cannot
    be set.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    size = 12  # pt; the SVG is measured in em, so it follows the text around it
    try:
        path = TextPath((0, 0), f"${tex}$", size=size, prop=FontProperties(math_fontfamily="stix"))
    except ValueError:
        return f"<code>{html.escape(tex)}</code>"
    pen = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}  # matplotlib.path.Path's codes
    steps = (
        pen[code]
        + ("" if code == 79 else " ".join(f"{v:.2f}" for v in (points.reshape(-1, 2) * (1, -1)).ravel()))
        for points, code in path.iter_segments(simplify=False, curves=True)
    )
    box = path.get_extents()
    left, bottom, width, height = (float(v) for v in box.bounds)
    style = f"width:{width / size:.3f}em;height:{height / size:.3f}em;vertical-align:{bottom / size:.3f}em"
    picture = (
        f'<svg class="math" role="img" aria-label="{html.escape(tex, quote=True)}" style="{style}" '
        f'viewBox="{left:.2f} {-bottom - height:.2f} {width:.2f} {height:.2f}">'
        f'<path fill="currentColor" d="{"".join(steps)}"/></svg>'
    )
    return f'<div class="math-display">{picture}</div>' if display else picture


def highlight_code(code: str, language: str = "python") -> str:
    """Return `code` as highlighted HTML; an unknown language is shown plain."""
    try:
        lexer = get_lexer_by_name(language or "text")
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return highlight(code, lexer, HtmlFormatter(cssclass="highlight", wrapcode=True))


@dataclass
class Converter:
    """Converts the texts of one page, and remembers its headings, citations and the files that it shows.

    `source` is the page's path in the site ("runs/phantom/notebooks/01-data-audit.ipynb"), `pages` all
    sources of the site.
    """

    source: str
    bibliography: dict[str, dict[str, str]]
    pages: set[str]
    numbers: dict[str, int] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)
    headings: list[tuple[int, str, str]] = field(default_factory=list)
    cited: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)

    def __post_init__(self):
        self._markdown = mistune.create_markdown(
            renderer=_Renderer(self), plugins=["table", "math", "strikethrough", _add_quarto_rules]
        )

    def number_labels(self, text: str) -> None:
        """Give the figures and tables of the page their numbers, in the order of their labels in `text`; note
        its sections.
        """
        for label in re.findall(r"(?:\{#|#\|\s*label:\s*)((?:fig|tbl)-[\w-]+)", text):
            of_kind = [known for known in self.numbers if known[:3] == label[:3]]
            self.numbers.setdefault(label, len(of_kind) + 1)
        self.sections |= {
            identity: title
            for title, identity in re.findall(r"^#+ (.*?) *\{#(sec-[\w-]+)", text, flags=re.MULTILINE)
        }

    def convert(self, text: str) -> str:
        """Return `text` as HTML."""
        markup = self._markdown(text)
        markup = re.sub(
            r'<table>((?:(?!<table>).)*?</table>)\s*<p class="table-caption"( id="[^"]*")?>(.*?)</p>',
            r"<table\2><caption>\3</caption>\1",
            markup,
            flags=re.DOTALL,
        )
        return re.sub(r"<p>\s*(<figure.*?</figure>)\s*</p>", r"\1", markup, flags=re.DOTALL)

    def resolve(self, target: str) -> str | None:
        """Return the address of `target` as seen from this page, or None if there is no such file.

        Pages become .html, files are noted for copying, and what a run would have made falls back to what is
        published.
        """
        if re.match(r"[a-z]+:|#|$", target):
            return target
        path, _, anchor = target.partition("#")
        here = PurePosixPath(self.source).parent  # a leading "/" is the root of the project, as in Quarto
        found = locate(
            path[1:] if path.startswith("/") else os.path.normpath(here / path).replace(os.sep, "/")
        )
        if found is None:
            return None
        if found in self.pages:
            found = str(PurePosixPath(found).with_suffix(".html"))
        elif found.endswith((".qmd", ".ipynb")):
            return None
        else:
            self.files.add(found)
        return os.path.relpath(found, here).replace(os.sep, "/") + (f"#{anchor}" if anchor else "")

    def name_label(self, label: str) -> str:
        """Return "Figure 2" for a label; a section is called by its heading."""
        if label in self.numbers:
            return f"{KINDS[label[:3]]} {self.numbers[label]}"
        return self.sections.get(label, KINDS[label[:3]])

    def caption(self, label: str, text: str) -> str:
        """Return a caption with its number in front."""
        return f"{self.name_label(label)}: {text}" if label in self.numbers else text


class _Renderer(mistune.HTMLRenderer):
    """mistune's HTML with the page's links, figures, headings, math and divs."""

    def __init__(self, page: Converter):
        super().__init__(escape=False)
        self.page = page
        self.open_divs: list[str] = []

    def heading(self, text, level, **attrs):
        given = re.search(r"\s*\{([^{}]*)\}\s*$", text)
        text = text[: given.start()] if given else text
        plain = html.unescape(re.sub(r"<[^>]+>", "", text)).strip()
        identity = parse_attributes(given[1] if given else "").get("id") or re.sub(
            r"[^\w]+", "-", plain.lower()
        ).strip("-")
        self.page.headings.append((level, identity, plain))
        return f'<h{level} id="{identity}">{text}</h{level}>\n'

    def link(self, text, url, title=None):
        target = self.page.resolve(url)
        if target is None:
            return f'<span class="not-here" title="appears here after make report">{text}</span>'
        return f'<a href="{html.escape(target, quote=True)}">{text}</a>'

    def block_code(self, code, info=None):
        return highlight_code(code, re.sub(r"[{}.]", "", info or "").split(" ")[0])

    def inline_math(self, text):
        return render_math(text)

    def block_math(self, text):
        return render_math(text.replace("\n", " "), display=True)

    def quarto_image(self, text, src, attributes):
        target, label = self.page.resolve(src), attributes.get("id", "")
        if target is None:
            return '<span class="not-here">The figure appears here after make report.</span>'
        plain = re.sub(r"<[^>]+>", "", text)
        alt = html.escape(attributes.get("fig-alt") or html.unescape(plain), quote=True)
        width = f' style="width:{attributes["width"]}"' if "width" in attributes else ""
        image = f'<img src="{html.escape(target, quote=True)}" alt="{alt}"{width} loading="lazy">'
        if not text:
            return image
        identity = f' id="{label}"' if label else ""
        return f"<figure{identity}>{image}<figcaption>{self.page.caption(label, text)}</figcaption></figure>"

    def quarto_span(self, text, attributes):
        return f"<span{_html_attributes(attributes)}>{text}</span>"

    def quarto_citation(self, text, parts):
        return "".join(self._cite(part) for part in parts)

    def _cite(self, part):
        prefix, key, suffix, narrative = part
        if key.split("-")[0] in KINDS:
            return f'{prefix}<a href="#{key}">{self.page.name_label(key)}</a>{suffix}'
        if key not in self.page.bibliography:
            return f"{prefix}@{key}{suffix}"
        if key not in self.page.cited:
            self.page.cited.append(key)
        authors, year = cite_short(self.page.bibliography[key])
        short = f"{authors} ({year})" if narrative else f"{authors}, {year}"
        return f'{prefix}<a class="citation" href="#ref-{key}">{html.escape(short)}</a>{suffix}'

    def quarto_div_open(self, text, attributes):
        callout = re.search(r"callout-(\w+)", attributes["class"])
        if not callout:
            self.open_divs.append("</div>\n")
            return f"<div{_html_attributes(attributes)}>\n"
        title = html.escape(attributes.get("title", callout[1].capitalize()))
        if "collapse" in attributes:
            self.open_divs.append("</div></details>\n")
            opened = "" if attributes["collapse"] == "true" else " open"
            return f'<details class="callout callout-{callout[1]}"{opened}><summary>{title}</summary><div>\n'
        self.open_divs.append("</div>\n")
        return f'<div class="callout callout-{callout[1]}"><p class="callout-title">{title}</p>\n'

    def quarto_div_close(self, text):
        return self.open_divs.pop() if self.open_divs else ""

    def quarto_caption(self, text, attributes):
        label = attributes.get("id", "")
        identity = f' id="{label}"' if label else ""
        return f'<p class="table-caption"{identity}>{self.page.caption(label, text)}</p>\n'


def _html_attributes(attributes: dict[str, str]) -> str:
    wanted = (
        (name, value)
        for name, value in attributes.items()
        if value and name in ("id", "class", "style", "title")
    )
    return "".join(f' {name}="{html.escape(value, quote=True)}"' for name, value in wanted)


_IMAGE = (
    r"!\[(?P<image_text>(?:\\.|[^\[\]\\]|\[[^\]]*\])*)\]\((?P<image_src>[^)\s]+)\)"
    r"(?:\{(?P<image_attributes>[^}]*)\})?"
)
_SPAN = r"\[(?P<span_text>[^\[\]]*)\]\{(?P<span_attributes>[^}]*)\}"
_GROUP = r"\[(?P<cite_group>[^\[\]]*@[\w-]+[^\[\]]*)\](?![({])"
_NARRATIVE = r"(?<![\w.@/])@(?P<cite_key>[A-Za-z][\w-]*\w)"
_DIV_OPEN = r"^ {0,3}:{3,}[ \t]*(?:\{(?P<div_attributes>[^}\n]*)\}|(?P<div_name>[\w-]+))[ \t]*$"
_DIV_CLOSE = r"^ {0,3}:{3,}[ \t]*$"
_CAPTION = r"^: +(?P<caption_text>[^\n]+?)[ \t]*(?:\{(?P<caption_attributes>[^}\n]*)\})?[ \t]*$"


def _add_quarto_rules(markdown: mistune.Markdown) -> None:
    inline, block = markdown.inline, markdown.block
    inline.register("quarto_image", _IMAGE, _parse_image, before="link")
    inline.register("quarto_span", _SPAN, _parse_span, before="link")
    inline.register("quarto_group", _GROUP, _parse_group, before="link")
    inline.register("quarto_narrative", _NARRATIVE, _parse_narrative, before="link")
    block.register("quarto_div_open", _DIV_OPEN, _parse_div_open, before="list")
    block.register("quarto_div_close", _DIV_CLOSE, _parse_div_close, before="list")
    block.register("quarto_caption", _CAPTION, _parse_caption, before="list")


def _children(inline, text: str, state) -> list:
    inner = state.copy()
    inner.src = text
    return inline.render(inner)


def _parse_image(inline, match, state):
    state.append_token(
        {
            "type": "quarto_image",
            "children": _children(inline, match["image_text"], state),
            "attrs": {"src": match["image_src"], "attributes": parse_attributes(match["image_attributes"])},
        }
    )
    return match.end()


def _parse_span(inline, match, state):
    state.append_token(
        {
            "type": "quarto_span",
            "children": _children(inline, match["span_text"], state),
            "attrs": {"attributes": parse_attributes(match["span_attributes"])},
        }
    )
    return match.end()


def _parse_group(inline, match, state):
    group = match["cite_group"]
    found = [re.match(r"(.*?)-?@([\w-]+)(.*)$", part.strip()) for part in group.split(";")]
    if not all(found):
        return None
    reference = found[0][2].split("-")[0] in KINDS
    parts = [(prefix, key, suffix, False) for prefix, key, suffix in (item.groups() for item in found)]
    joined = [
        (
            ("; " if i else "" if reference else "(") + p,
            key,
            s + (")" if i == len(parts) - 1 and not reference else ""),
            n,
        )
        for i, (p, key, s, n) in enumerate(parts)
    ]
    state.append_token({"type": "quarto_citation", "raw": "", "attrs": {"parts": joined}})
    return match.end()


def _parse_narrative(inline, match, state):
    state.append_token(
        {"type": "quarto_citation", "raw": "", "attrs": {"parts": [("", match["cite_key"], "", True)]}}
    )
    return match.end()


def _parse_div_open(block, match, state):
    attributes = parse_attributes(match["div_attributes"] or f".{match['div_name']}")
    state.append_token({"type": "quarto_div_open", "raw": "", "attrs": {"attributes": attributes}})
    return match.end() + 1


def _parse_div_close(block, match, state):
    state.append_token({"type": "quarto_div_close", "raw": ""})
    return match.end() + 1


def _parse_caption(block, match, state):
    state.append_token(
        {
            "type": "quarto_caption",
            "text": match["caption_text"],
            "attrs": {"attributes": parse_attributes(match["caption_attributes"])},
        }
    )
    return match.end() + 1
