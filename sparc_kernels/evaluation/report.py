"""The report of `sparc-kernels eval`: one HTML file with embedded figures."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

from ..core.validation import MARK, missing
from ..io.labels import Pictures
from ..metrics import Codes, activation_cosine, jaccard, top_rows

_OWN, _LOCAL = "#c2410c", "#2563eb"  # colours of `selections`
_GREY = "#78716c"
_LATENTS, _ROWS = 16, 8  # of the gallery


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


def import_jinja2():
    """Return the module jinja2.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing("writing a page", "jinja2") from error
    return jinja2


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
    per_latent = histogram = None
    if labels is not None and len(record["streams"]) > 1:
        scores = {
            kind: jaccard(codes[kind], labels.to(codes[kind][next(iter(codes[kind]))].values.device)) for kind in kinds
        }
        per_latent = scores["local"].per_latent
        histogram = _image(_histogram({kinds[kind]: s.per_latent[s.alive].cpu() for kind, s in scores.items()}))
    return _render(
        "report.html",
        record["model"],
        record=record,
        trained=", ".join(f"{key} {value}" for key, value in record["trained"].items()),
        agreement=_agreement_table(record, kinds),
        jaccard=histogram,
        dead=_image(_bars(record, kinds)),
        variance=_image(_matrices(record, kinds)),
        retrieval=_retrieval_table(record) if "retrieval" in record else None,
        probes=_probe_table(record, kinds) if "probe" in record["own"] else None,
        latents=_gallery(codes["local"], labels, names, pictures, per_latent) if pictures else None,
    )


def latent_page(title: str, rows: dict[str, list[int]], pictures: dict[str, Pictures | list[str]]) -> str:
    """Render the page of one latent.

    Args:
        title: plain text.
        rows: stream -> rows to show.
        pictures: as `html` takes them.
    """
    return _render("latent.html", title, streams=[_stream(s, some, pictures.get(s)) for s, some in rows.items()])


def _render(template: str, title: str, **values) -> str:
    """Render a file of templates/; all values are escaped."""
    jinja2 = import_jinja2()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(mark=MARK, title=title, **values)


def _table(head: list[str], rows: list[list[str]], sums: int = 0) -> dict:
    """A table for the template; its last `sums` rows are emphasised."""
    return {"head": head, "rows": rows, "sums": sums}


def _agreement_table(record: dict, kinds: dict[str, str]) -> dict:
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


def _retrieval_table(record: dict) -> dict:
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


def _probe_table(record: dict, kinds: dict[str, str]) -> dict:
    def cell(value):
        return "no class has enough rows" if value is None else f"{value:.3f}"

    rows = [
        [s, str(own_probe["classes"]), *(cell(record[kind]["probe"][s]["log_loss"]) for kind in kinds)]
        for s, own_probe in record["own"]["probe"].items()
    ]
    return _table(["stream", "classes", *kinds.values()], rows)


def _image(figure) -> dict:
    """A figure for the template."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=140)
    return {"width": f"{figure.get_figwidth() * 80:.0f}", "src": _data(file.getvalue())}


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


def _gallery(codes, labels, names, pictures, per_latent) -> list[dict]:
    """Latents that agree best between streams, among those that fire on 5 or more rows of each, with their top rows."""
    fired = torch.stack([torch.bincount(c.indices[c.values > 0], minlength=c.n_latents) for c in codes.values()])
    score = activation_cosine(codes) if len(codes) > 1 else fired[0].double()
    ranking = score if per_latent is None else score * per_latent
    ranking = ranking * (fired >= 5).all(0)
    title, words = "cosine" if len(codes) > 1 else "rows", set()
    latents: list[dict] = []
    for latent in ranking.argsort(descending=True, stable=True).tolist():
        if ranking[latent] <= 0 or len(latents) == _LATENTS:
            break
        word = _best_label(codes, labels, names, latent)
        if word in words:  # one latent for each class
            continue
        words.add(word)
        streams = []
        for s, c in codes.items():
            shown, rows = pictures.get(s), top_rows(c, latent, _ROWS)[0].tolist()
            streams.append(_stream(s, rows if isinstance(shown, Pictures) else rows[: _ROWS // 2], shown))
        latents.append({"number": latent, "word": word, "score": f"{title} {score[latent]:.2f}", "streams": streams})
    return latents


def _stream(s: str, rows: list[int], shown: Pictures | list[str] | None) -> dict:
    """Rows of a stream for the template: as pictures, as texts, or as numbers where it has neither."""
    pictures = texts = None
    if isinstance(shown, Pictures):
        pictures = [(row, _thumbnail(shown, row)) for row in rows]
    elif shown is not None:
        texts = [_shorten(shown[row], 90) for row in rows]
    return {"name": s, "rows": rows, "pictures": pictures, "texts": texts}


def _thumbnail(pictures: Pictures, row: int) -> str:
    picture, file = pictures.picture(row), io.BytesIO()
    picture.thumbnail((96, 96))
    picture.save(file, "PNG")
    return _data(file.getvalue())


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
