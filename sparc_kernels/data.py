"""Small real data sets, built on the spot: no download, no file on disk.

`unicode_streams` shows one concept, a Unicode character, to three models that never meet: a classifier of its sans-serif
rendering, an autoencoder of its serif rendering, and a text embedding of its name. `digits_streams` is the smoke test.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 32  # pixels, both sides
_FONT_SIZE = 24  # pixels per em: a capital is 17 pixels high, the tallest box drawings just fit


@dataclass(frozen=True)
class StreamData:
    """Paired streams of n samples of which some are held out; row i of every stream describes the same sample.

    Attributes:
        train: stream name -> float32 [n_train, d_s], every row divided by (its norm + 1e-8).
        test: the same for the held-out rows, float32 [n_test, d_s].
        labels: bool [n, C], multi-hot, in the order of all n samples; see `train_labels`, `test_labels`.
        label_names: C names.
        characters: n single characters.
        names: n names, one per sample.
        images: picture kind -> uint8 [n, height, width], 0 is background and 255 is ink.
        train_rows: int64 [n_train], where row i of `train` stands among the n samples.
        test_rows: int64 [n_test].
    """

    train: dict[str, Tensor]
    test: dict[str, Tensor]
    labels: Tensor
    label_names: tuple[str, ...]
    characters: tuple[str, ...]
    names: tuple[str, ...]
    images: dict[str, Tensor]
    train_rows: Tensor
    test_rows: Tensor

    @property
    def train_labels(self) -> Tensor:
        """bool [n_train, C]"""
        return self.labels[self.train_rows]

    @property
    def test_labels(self) -> Tensor:
        """bool [n_test, C]"""
        return self.labels[self.test_rows]

    @property
    def d_streams(self) -> dict[str, int]:
        """Stream name -> width, as `AlignedSAE` wants it."""
        return {s: x.shape[1] for s, x in self.train.items()}


def unicode_streams(seed: int = 0, quick: bool = False) -> StreamData:
    """About 3,000 Unicode characters as three models see them.

    Streams: `sans` [128], hidden activations of a CNN trained to predict name words from the DejaVu Sans rendering;
    `serif` [96], bottleneck of a convolutional autoencoder of the DejaVu Serif rendering; `name` [128], character
    n-gram TF-IDF and truncated SVD of the Unicode name. All three are fitted on the training rows only.
    Labels are the name words that at least 15 of the characters carry.

    Args:
        seed: decides the held-out rows, the initial weights and the order of the mini-batches.
        quick: fewer epochs for both networks, 300 instead of 600 rows held out and 1,500 characters in all.

    Returns:
        `StreamData`; equal seeds give equal data on the same machine. `images` has the kinds `sans` and `serif`.

    Raises:
        ImportError: without matplotlib and scikit-learn (`pip install "sparc_kernels[demo]"`).
        ValueError: for a negative seed.
    """
    generator = _generator(seed)
    codepoints, images = _render(*_fonts())
    if quick:
        keep = torch.randperm(len(codepoints), generator=generator)[:1500].sort().values
        codepoints = [codepoints[i] for i in keep.tolist()]
        images = {kind: x[keep] for kind, x in images.items()}
    names = tuple(unicodedata.name(chr(c)) for c in codepoints)
    labels, label_names = _word_labels(names, min_count=15)
    train_rows, test_rows = _split(len(names), 300 if quick else 600, generator)

    epochs = 8 if quick else 20
    with _seeded(seed):
        classifier = _Classifier(128, len(label_names))
        _fit(classifier, images["sans"][train_rows], labels[train_rows].float(), _classifier_loss, epochs, generator)
        autoencoder = _Autoencoder(96)
        serif = images["serif"][train_rows]
        _fit(autoencoder, serif, serif, _autoencoder_loss, epochs, generator)
    features = {
        "sans": _hidden(classifier, images["sans"]),
        "serif": _hidden(autoencoder, images["serif"]),
        "name": _name_features(names, train_rows, width=128, seed=seed),
    }
    return _streams(features, labels, label_names, tuple(map(chr, codepoints)), names, images, train_rows, test_rows)


def _fonts():
    """The two font files that matplotlib brings, and the module that reads their character maps."""
    try:
        import matplotlib
        from matplotlib import ft2font
    except ImportError as error:
        raise _missing("matplotlib") from error
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return {kind: os.path.join(folder, f"DejaVu{kind.title()}.ttf") for kind in ("sans", "serif")}, ft2font.FT2Font


def _render(paths: dict[str, str], open_font) -> tuple[list[int], dict[str, Tensor]]:
    """Every named character that has ink in all fonts: n code points, and kind -> uint8 [n, 32, 32]."""
    from PIL import ImageFont  # a requirement of matplotlib

    covered = set.intersection(*(set(open_font(path).get_charmap()) for path in paths.values()))
    codepoints = sorted(c for c in covered if unicodedata.name(chr(c), ""))
    images = {}
    for kind, path in paths.items():
        fonts = [
            ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
            for size in range(_FONT_SIZE, 3, -2)  # a glyph too large for the picture is drawn smaller
        ]
        images[kind] = torch.stack([_draw(chr(c), fonts) for c in codepoints])
    inked = torch.stack([x.flatten(1).amax(1) > 0 for x in images.values()]).all(0)  # spaces and selectors have none
    return [c for c, ink in zip(codepoints, inked.tolist(), strict=True) if ink], {k: x[inked] for k, x in images.items()}


def _draw(character: str, fonts) -> Tensor:
    """uint8 [32, 32]; advance width centred, on a common baseline, moved only where that would clip the glyph."""
    from PIL import Image, ImageDraw

    for font in fonts:
        left, top, right, bottom = font.getbbox(character, anchor="ls")  # relative to the baseline
        if right - left <= IMAGE_SIZE and bottom - top <= IMAGE_SIZE:
            break
    x = min(max((IMAGE_SIZE - round(font.getlength(character))) // 2, -left), IMAGE_SIZE - right)
    y = min(max(23, -top), IMAGE_SIZE - bottom)
    canvas = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    ImageDraw.Draw(canvas).text((x, y), character, fill=255, font=font, anchor="ls")
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(IMAGE_SIZE, IMAGE_SIZE)


def _word_labels(names: tuple[str, ...], min_count: int) -> tuple[Tensor, tuple[str, ...]]:
    """Words of the names as labels: bool [n, C], and the C words, most frequent first."""
    words = [set(name.replace("-", " ").split()) for name in names]
    counts = Counter(word for row in words for word in sorted(row))
    label_names = tuple(word for word, count in counts.most_common() if count >= min_count)
    return torch.tensor([[word in row for word in label_names] for row in words]), label_names


class _Classifier(nn.Module):
    """uint8 pictures -> C logits; `hidden` is the layer that becomes a stream."""

    def __init__(self, width: int, n_classes: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
        )
        self.dense = nn.Linear(32 * (IMAGE_SIZE // 4) ** 2, width)
        self.head = nn.Linear(width, n_classes)

    def hidden(self, images: Tensor) -> Tensor:
        return self.dense(self.convolutions(images).flatten(1)).relu()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images))


class _Autoencoder(nn.Module):
    """Pictures [B, 1, 32, 32] -> logits of the same pictures; `hidden` is the bottleneck."""

    def __init__(self, width: int):
        super().__init__()
        side = IMAGE_SIZE // 4
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
        )
        self.dense = nn.Linear(32 * side**2, width)
        self.decoder = nn.Sequential(
            nn.Linear(width, 32 * side**2),
            nn.ReLU(),
            nn.Unflatten(1, (32, side, side)),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        )

    def hidden(self, images: Tensor) -> Tensor:
        return self.dense(self.convolutions(images).flatten(1)).relu()

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.hidden(images))


def _pixels(images: Tensor) -> Tensor:
    """uint8 [B, h, w] -> float32 [B, 1, h, w] between 0 and 1."""
    return images.unsqueeze(1).float() / 255


def _fit(model, inputs, targets, loss, epochs, generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(64):
            optimizer.zero_grad()
            loss(model(_pixels(inputs[rows])), targets[rows]).backward()
            optimizer.step()


def _classifier_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels)


def _autoencoder_loss(logits: Tensor, images: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, _pixels(images))


@torch.no_grad()
def _hidden(model, images: Tensor) -> Tensor:
    return torch.cat([model.hidden(_pixels(block)) for block in images.split(512)])


def _name_features(names, train_rows: Tensor, width: int, seed: int) -> Tensor:
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise _missing("scikit-learn") from error
    tfidf = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    svd = TruncatedSVD(width, random_state=seed)
    svd.fit(tfidf.fit_transform([names[i] for i in train_rows.tolist()]))
    return torch.from_numpy(svd.transform(tfidf.transform(names))).float()


def _split(n: int, n_test: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ascending rows of the training and of the held-out part."""
    order = torch.randperm(n, generator=generator)
    return order[n_test:].sort().values, order[:n_test].sort().values


def _streams(features, labels, label_names, characters, names, images, train_rows, test_rows) -> StreamData:
    features = {s: x / (x.norm(dim=1, keepdim=True) + 1e-8) for s, x in features.items()}
    train = {s: x[train_rows] for s, x in features.items()}
    test = {s: x[test_rows] for s, x in features.items()}
    return StreamData(train, test, labels, label_names, characters, names, images, train_rows, test_rows)


def _generator(seed: int) -> torch.Generator:
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed!r}")
    return torch.Generator().manual_seed(seed)


@contextmanager
def _seeded(seed: int):
    """Fix the initial weights made inside without disturbing the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _missing(package: str) -> ImportError:
    return ImportError(f'this data set needs {package}, which is not installed: pip install "sparc_kernels[demo]"')
