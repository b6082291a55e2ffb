"""The report of `sparc-kernels eval`: one HTML file with embedded figures."""

from __future__ import annotations

import base64
import io
from html import escape

import torch
from torch import Tensor

from ..core.validation import MARK, missing
from ..io.labels import Pictures
from ..metrics import Codes, activation_cosine, jaccard, top_rows

_OWN, _LOCAL = "#c2410c", "#2563eb"  # colours of `selections`
_GREY = "#78716c"
_LATENTS, _ROWS = 16, 8  # of the gallery
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #292524; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p { margin: .3rem 0; max-width: 46rem } .note { color: #78716c; font-size: .9rem }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .15rem .8rem; text-align: right }
th { color: #57534e; font-weight: 600; border-bottom: 1px solid #d6d3d1 }
td:first-child, th:first-child { text-align: left }
tr.sum td { border-top: 1px solid #d6d3d1; font-weight: 600 } img.figure { max-width: 100%; height: auto }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(31rem, 1fr)); gap: 1rem }
.latent { border: 1px solid #e7e5e4; border-radius: 6px; padding: .5rem .7rem; overflow: hidden }
.latent h3 { font-size: 1rem; margin: 0 0 .2rem } .latent h3 span { float: right; font-weight: 400; color: #78716c }
.stream { display: flex; align-items: center; gap: .5rem; margin: .25rem 0; min-height: 1.6rem }
.stream > b { flex: 0 0 4.5rem; font-weight: 500; color: #78716c; font-size: .85rem; overflow-wrap: anywhere }
.stream img { height: 46px; border: 1px solid #e7e5e4 } .stream div { font-size: .82rem; line-height: 1.35 }
"""


def import_matplotlib():
    """Return matplotlib's Figure class.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("drawing figures", "matplotlib") from error
    return Figure


def selections(record: dict) -> dict[str, str]:
    """Return the selections that were scored, {"own" or "local": title}; only "local" for a locally selecting model.

    Args:
        record: as `html` takes it.
    """
    changed = ", ".join(f"{key} {record[key]}" for key in record["trained"])
    own = {} if record["topk_type"] == "local" else {"own": f"with {changed}" if changed else "selected as in training"}
    return own | {"local": "each stream alone"}


def html(
    record: dict,
    codes: dict[str, dict[str, Codes]],
    labels: Tensor | None,
    names: list[str] | None,
    pictures: dict[str, Pictures | list[str]],
) -> str:
    """Render the report.

    Args:
        record: scores of `evaluate` with the model's settings; `trained` has the settings of training that were
            replaced.
        codes: of `evaluate`.
        labels: bool [n, C], or None.
        names: of the C classes, or None.
        pictures: stream -> pictures or texts of its rows; streams without either are left out.
    """
    kinds = selections(record)
    trained = ", ".join(f"{key} {value}" for key, value in record["trained"].items())
    parts = [
        f"<p class=note>{record['rows']:,} rows; N {record['n_latents']:,}, k {record['k']}, {record['topk_type']} "
        f"selection{f', but {trained}' if trained else ''} in training; "
        f"streams {escape(', '.join(record['streams']))}</p>",
        "<h2>Agreement of the streams</h2>",
        _agreement_table(record, kinds),
    ]
    per_latent = None
    if labels is not None and len(record["streams"]) > 1:
        scores = {kind: jaccard(codes[kind], labels.to(codes[kind][next(iter(codes[kind]))].values.device))
                  for kind in kinds}  # fmt: skip
        per_latent = scores["local"].per_latent
        figure = _histogram({kinds[kind]: s.per_latent[s.alive].cpu() for kind, s in scores.items()})
        parts += ["<h2>Jaccard of the latents</h2>", _image(figure)]
        parts += ["<p class=note>Latents alive in some stream. 1: they fire equally often on every label, whichever "
                  "stream they see.</p>"]  # fmt: skip
    parts += ["<h2>Dead latents</h2>", _image(_bars(record, kinds))]
    parts += ["<p class=note>Dead: never fired on these rows. Mixed: dead in some streams only.</p>"]
    parts += ["<h2>Explained variance</h2>", _image(_matrices(record, kinds))]
    parts += ["<p class=note>Row: the stream that is reconstructed. Column: the stream whose code is used. 1: perfect, "
              "0: as good as the mean.</p>"]  # fmt: skip
    if "retrieval" in record:
        parts += ["<h2>Retrieval</h2>", _retrieval_table(record)]
        parts += ["<p class=note>Each stream selects alone: shared selection would give the partner away.</p>"]
    if "probe" in record["own"]:
        parts += ["<h2>1-D probes</h2>", _probe_table(record, kinds)]
        parts += ["<p class=note>Test log-loss of the best single latent of each class, in nats; chance is 0.693.</p>"]
    if pictures:
        parts += ["<h2>What excites latents</h2>", _gallery(codes["local"], labels, names, pictures, per_latent)]
    return page(record["model"], "\n".join(parts))


def page(title: str, body: str) -> str:
    """Wrap a body in a complete HTML document.

    Args:
        title: plain text.
        body: HTML.
    """
    head = f'<!doctype html><html lang=en><meta charset=utf-8><meta name=generator content="{MARK}">'
    head += f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"{head}\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"


def _table(head: list[str], rows: list[list[str]], sums: int = 0) -> str:
    """HTML table of text cells; the last `sums` rows are emphasised."""
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}" for cell in head) + "</tr>"]
    for i, row in enumerate(rows):
        mark = " class=sum" if i >= len(rows) - sums else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _agreement_table(record: dict, kinds: dict[str, str]) -> str:
    titles = {
        "jaccard": "Jaccard, all latents",
        "jaccard_alive": "Jaccard, alive latents",
        "jaccard_chance": "Jaccard, latents renumbered at random",
        "activation_cosine": "cosine of activations",
        "all_dead": "dead in every stream",
        "mixed": "dead in some (mixed)",
        "all_alive": "alive in every stream",
        "explained_variance_self": "explained variance, self",
        "explained_variance_cross": "explained variance, cross",
    }
    rows = [
        [title, *(f"{record[kind][key]:.3f}" for kind in kinds)]
        for key, title in titles.items()
        if key in record["own"]
    ]
    return _table(["", *kinds.values()], rows)


def _retrieval_table(record: dict) -> str:
    columns = ["R@1", "R@5", "R@10", "median_rank", "MRR"]
    rows, kinds = [], {k: v for k, v in record["retrieval"].items() if k != "mean"}

    def cells(values):
        return [f"{values[c]:,.0f}" if c == "median_rank" else f"{values[c]:.3f}" for c in columns]

    for kind, by_pair in kinds.items():
        rows += [[f"{kind.replace('_', ' ')}, {pair}", *cells(values)] for pair, values in by_pair.items()]
    for kind in kinds:
        rows.append([f"{kind.replace('_', ' ')}, mean", *cells(record["retrieval"]["mean"][kind])])
    chance = {**record["chance"], "median_rank": record["rows"] / 2}
    rows.append(["chance", *(f"{chance[c]:,.0f}" if c == "median_rank" else f"{chance[c]:.4f}" for c in columns)])
    return _table(["target<-query", *(c.replace("_", " ") for c in columns)], rows, sums=len(kinds) + 1)


def _probe_table(record: dict, kinds: dict[str, str]) -> str:
    def cell(value):
        return "no class has enough rows" if value is None else f"{value:.3f}"

    rows = [
        [s, str(own_probe["classes"]), *(cell(record[kind]["probe"][s]["log_loss"]) for kind in kinds)]
        for s, own_probe in record["own"]["probe"].items()
    ]
    return _table(["stream", "classes", *kinds.values()], rows)


def _image(figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=140)
    return f'<img class=figure alt="" width={figure.get_figwidth() * 80:.0f} src="{_data(file.getvalue())}">'


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _figure(width: float, height: float):
    return import_matplotlib()(figsize=(width, height), layout="constrained")


def _histogram(by_kind: dict[str, Tensor]):
    figure = _figure(9, 3.2)
    axes = figure.subplots()
    colors = [_LOCAL] if len(by_kind) == 1 else [_OWN, _LOCAL]
    for (kind, values), color in zip(by_kind.items(), colors, strict=True):
        axes.hist(
            values.numpy(), bins=40, range=(0, 1), alpha=0.65, color=color, label=f"{kind}, mean {values.mean():.2f}"
        )
    axes.set(xlabel="Jaccard", ylabel="latents", xlim=(0, 1))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _bars(record: dict, kinds: dict[str, str]):
    figure = _figure(9, 0.7 + 0.55 * len(kinds))
    axes = figure.subplots()
    parts = {"all_alive": ("alive in every stream", "#65a30d"), "mixed": ("mixed", "#d97706"),
             "all_dead": ("dead in every stream", "#57534e")}  # fmt: skip
    left = [0.0] * len(kinds)
    for key, (label, color) in parts.items():
        widths = [record[kind][key] for kind in kinds]
        axes.barh(list(kinds.values()), widths, left=left, color=color, label=label, height=0.6)
        for i, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.06:
                axes.text(start + width / 2, i, f"{width:.1%}", ha="center", va="center", color="white", size=9)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlim=(0, 1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


def _matrices(record: dict, kinds: dict[str, str]):
    """Heat maps of explained variance, row t from column s, one for each selection."""
    streams = list(record["streams"])
    size = 1.4 + 0.75 * len(streams)
    figure = _figure((size + 1.0) * len(kinds), size)
    for axes, (kind, title) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        values = [[record[kind]["explained_variance"][f"{t}<-{s}"] for s in streams] for t in streams]
        shown = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                color = "black" if value > 0.6 else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, size=10)
        axes.set_xticks(range(len(streams)), streams, rotation=20, ha="right")
        axes.set_yticks(range(len(streams)), streams)
        axes.set_title(title, size=11)
        axes.set(xlabel="from the code of", ylabel="reconstruction of")
        axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    return figure


# -------------------------------------------------------------------------------------------------------------- gallery


def _gallery(codes, labels, names, pictures, per_latent) -> str:
    """Top rows of the latents that agree best between streams, among those that fire on 5 or more rows of each."""
    fired = torch.stack([torch.bincount(c.indices[c.values > 0], minlength=c.n_latents) for c in codes.values()])
    score = activation_cosine(codes) if len(codes) > 1 else fired[0].double()
    ranking = score if per_latent is None else score * per_latent
    ranking = ranking * (fired >= 5).all(0)
    title, cards, words = "cosine" if len(codes) > 1 else "rows", [], set()
    for latent in ranking.argsort(descending=True, stable=True).tolist():
        if ranking[latent] <= 0 or len(cards) == _LATENTS:
            break
        word = _best_label(codes, labels, names, latent)
        if word in words:  # one latent for each class
            continue
        words.add(word)
        head = f"{escape(word)}<span>latent {latent}, {title} {score[latent]:.2f}</span>"
        rows = {s: top_rows(c, latent, _ROWS)[0].tolist() for s, c in codes.items()}
        shown = {s: pictures.get(s) for s in codes}
        body = "".join(
            stream_rows(s, r if isinstance(shown[s], Pictures) else r[: _ROWS // 2], shown[s]) for s, r in rows.items()
        )
        cards.append(f"<div class=latent><h3>{head}</h3>{body}</div>")
    note = "<p class=note>Latents whose activations agree best between streams; of each stream the rows on which they "
    note += "fire most, each stream selecting alone.</p>"
    return f"{note}<div class=gallery>{''.join(cards)}</div>"


def stream_rows(s: str, rows: list[int], shown: Pictures | list[str] | None) -> str:
    """Render rows of a stream.

    Args:
        s: name of the stream.
        rows: row numbers.
        shown: the stream's pictures or texts; None: row numbers are shown.
    """
    if isinstance(shown, Pictures):
        items = "".join(_thumbnail(shown, row) for row in rows)
    elif shown is not None:
        items = "<div>" + "<br>".join(escape(_shorten(shown[row], 90)) for row in rows) + "</div>"
    else:
        items = "<div>rows " + ", ".join(map(str, rows)) + "</div>"
    return f"<div class=stream><b>{escape(s)}</b>{items}</div>"


def _thumbnail(pictures: Pictures, row: int) -> str:
    picture, file = pictures.picture(row), io.BytesIO()
    picture.thumbnail((96, 96))
    picture.save(file, "PNG")
    return f'<img alt="row {row}" title="row {row}" src="{_data(file.getvalue())}">'


def _best_label(codes, labels, names, latent: int) -> str:
    """The class that best predicts where the latent fires, by F1 averaged over streams."""
    if labels is None:
        return f"latent {latent}"
    total = torch.zeros(labels.shape[1], dtype=torch.float64, device="cpu")
    for c in codes.values():
        fired = ((c.indices == latent) & (c.values > 0)).any(1).cpu()
        hits = labels[fired].sum(0)
        total += 2 * hits / (fired.sum() + labels.sum(0)).clamp_min(1)
    best = int(total.argmax())
    return names[best] if names else f"class {best}"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
