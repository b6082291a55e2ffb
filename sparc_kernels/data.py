"""Small real data sets, generated in memory: no download, no file on disk.

`unicode_streams` represents one concept, a Unicode character, by three independent models: a classifier of its sans
rendering, an autoencoder of its serif rendering, and a text embedding of its name. `digits_streams` is the smoke test.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core.validation import check_int, missing

IMAGE_SIZE = 32  # pixels, both sides of a rendered character
MIN_LABEL_COUNT = 15  # characters whose names must contain a word for it to be a label
_FONT_SIZE = 24  # pixels per em: a capital is 17 pixels high, full-height box drawings just fit
_BASELINE = 23  # pixels from the top


@dataclass(frozen=True)
class StreamData:
    """Paired streams of n samples, some of them held out; row i of every stream describes the same sample.

    Attributes:
        train: stream name -> float32 [n_train, d_s]; centred on the training mean, rows divided by (norm + 1e-8).
        test: stream name -> float32 [n_test, d_s], the held-out rows, transformed like `train`.
        labels: bool [n, C], multi-hot, for all n samples; see also `train_labels` and `test_labels`.
        label_names: C names.
        characters: n single characters.
        names: n names.
        images: image kind -> uint8 [n, height, width]; 0 is background, 255 is ink.
        train_rows: int64 [n_train], sample of each row of `train`.
        test_rows: int64 [n_test], sample of each row of `test`.
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
        """Labels of the training rows, bool [n_train, C]."""
        return self.labels[self.train_rows]

    @property
    def test_labels(self) -> Tensor:
        """Labels of the held-out rows, bool [n_test, C]."""
        return self.labels[self.test_rows]

    @property
    def d_streams(self) -> dict[str, int]:
        """Stream name -> width, an argument of `AlignedSAE`."""
        return {s: x.shape[1] for s, x in self.train.items()}


def unicode_streams(seed: int = 0, quick: bool = False) -> StreamData:
    """Build streams of about 3,000 Unicode characters that DejaVu Sans and DejaVu Serif both draw.

    Streams: `sans` [128], hidden activations of a CNN trained to predict name words from the DejaVu Sans rendering;
    `serif` [96], bottleneck of a convolutional autoencoder of the DejaVu Serif rendering; `name` [128], character
    n-gram TF-IDF and truncated SVD of the Unicode name. All three are fitted on the training rows only.
    Labels are the words that occur in the names of at least 15 characters.

    Args:
        seed: of the held-out rows, the initial weights and the order of the mini-batches.
        quick: 1,600 characters with 300 held out, instead of all with 600 held out, and fewer epochs.

    Returns:
        StreamData with images of the kinds `sans` and `serif`. The same seed gives the same data on one machine.

    Raises:
        ValueError: for a negative seed.
        ImportError: without matplotlib and scikit-learn (the extra `demo`).
    """
    generator = _generator(seed)
    codepoints, images = _render()
    if quick:
        keep = torch.randperm(len(codepoints), generator=generator)[:1600].sort().values
        codepoints = [codepoints[i] for i in keep.tolist()]
        images = {kind: x[keep] for kind, x in images.items()}
    names = tuple(unicodedata.name(chr(c)) for c in codepoints)
    labels, label_names = _word_labels(names)
    train_rows, test_rows = _split(len(names), 300 if quick else 600, generator)

    epochs = 8 if quick else 20
    sans, serif = (images[kind].unsqueeze(1).float() / 255 for kind in ("sans", "serif"))
    with one_thread(), _seeded(seed):
        classifier = _Network([*_convolutions(), nn.Linear(_FLAT, 128)], [nn.Linear(128, len(label_names))])
        autoencoder = _Network([*_convolutions(), nn.Linear(_FLAT, 96)], [nn.Linear(96, _FLAT), *_deconvolutions()])
        classifier.fit(sans[train_rows], labels[train_rows].float(), epochs, generator)
        autoencoder.fit(serif[train_rows], serif[train_rows], epochs, generator)
        features = {
            "sans": classifier.activations(sans),
            "serif": autoencoder.activations(serif),
            "name": _name_features(names, train_rows, 128, seed),
        }
    characters = tuple(chr(c) for c in codepoints)
    train, test = (_normalised(features, train_rows, rows) for rows in (train_rows, test_rows))
    return StreamData(train, test, labels, label_names, characters, names, images, train_rows, test_rows)


def digits_streams(seed: int = 0) -> StreamData:
    """Build streams of scikit-learn's 1,797 handwritten digits, 8x8, in about a second.

    Streams: `pixels` [64]; `classifier` [48] and `autoencoder` [32], hidden activations of two small networks fitted on
    the training rows. 297 rows are held out. Labels are the ten digits.

    Args:
        seed: of the held-out rows, the initial weights and the order of the mini-batches.

    Returns:
        StreamData with images of the kind `pixels`.

    Raises:
        ValueError: for a negative seed.
        ImportError: without scikit-learn (the extra `demo`).
    """
    generator = _generator(seed)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing("this data set", "scikit-learn") from error
    digits = load_digits()
    pixels = torch.from_numpy(digits.data).float() / 16
    target = torch.from_numpy(digits.target).long()
    train_rows, test_rows = _split(len(pixels), 297, generator)
    with one_thread(), _seeded(seed):
        classifier = _Network([nn.Linear(64, 48)], [nn.Linear(48, 10)])
        autoencoder = _Network([nn.Linear(64, 32)], [nn.Linear(32, 64)])
        classifier.fit(pixels[train_rows], F.one_hot(target[train_rows], 10).float(), 20, generator)
        autoencoder.fit(pixels[train_rows], pixels[train_rows], 20, generator)
        features = {
            "pixels": pixels,
            "classifier": classifier.activations(pixels),
            "autoencoder": autoencoder.activations(pixels),
        }
    label_names = tuple(unicodedata.name(str(d)) for d in range(10))  # DIGIT ZERO, ...
    train, test = (_normalised(features, train_rows, rows) for rows in (train_rows, test_rows))
    return StreamData(
        train,
        test,
        labels=F.one_hot(target, 10).bool(),
        label_names=label_names,
        characters=tuple(str(d) for d in target.tolist()),
        names=tuple(label_names[d] for d in target.tolist()),
        images={"pixels": (pixels * 255).round().to(torch.uint8).view(-1, 8, 8)},
        train_rows=train_rows,
        test_rows=test_rows,
    )


def _render() -> tuple[list[int], dict[str, Tensor]]:
    """Every named character that has ink in both fonts: n code points, and font kind -> uint8 [n, 32, 32]."""
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
        from PIL import ImageFont  # a requirement of matplotlib
    except ImportError as error:
        raise missing("this data set", "matplotlib") from error
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    paths = {kind: os.path.join(folder, f"DejaVu{kind.title()}.ttf") for kind in ("sans", "serif")}
    covered = set.intersection(*(set(FT2Font(path).get_charmap()) for path in paths.values()))
    codepoints = sorted(c for c in covered if unicodedata.name(chr(c), ""))
    images = {}
    for kind, path in paths.items():
        fonts = [  # smaller sizes for glyphs that do not fit
            ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC) for size in range(_FONT_SIZE, 3, -2)
        ]
        images[kind] = torch.stack([_draw(chr(c), fonts) for c in codepoints])
    inked = torch.stack([x.flatten(1).amax(1) > 0 for x in images.values()]).all(0)  # spaces and selectors have none
    codepoints = [codepoints[i] for i in inked.nonzero().flatten().tolist()]
    return codepoints, {kind: x[inked] for kind, x in images.items()}


def _draw(character: str, fonts) -> Tensor:
    """Render a character, uint8 [32, 32]: centred horizontally on a common baseline, shifted if it would be clipped."""
    from PIL import Image, ImageDraw

    for font in fonts:
        left, top, right, bottom = font.getbbox(character, anchor="ls")  # cell and ink, from the pen on the baseline
        if right - left <= IMAGE_SIZE and bottom - top <= IMAGE_SIZE:
            break
    x = (IMAGE_SIZE - (right - left)) // 2 - left
    y = min(max(_BASELINE, -top), IMAGE_SIZE - bottom)
    canvas = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    ImageDraw.Draw(canvas).text((x, y), character, fill=255, font=font, anchor="ls")
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(IMAGE_SIZE, IMAGE_SIZE)


def _word_labels(names: tuple[str, ...]) -> tuple[Tensor, tuple[str, ...]]:
    """Frequent words of the names: bool [n, C], and the C words, most frequent first, ties in alphabetical order."""
    words = [set(name.replace("-", " ").split()) for name in names]
    counts = Counter(word for row in words for word in row)
    frequent = [word for word, count in counts.items() if count >= MIN_LABEL_COUNT]
    label_names = tuple(sorted(frequent, key=lambda word: (-counts[word], word)))
    return torch.tensor([[word in row for word in label_names] for row in words]), label_names


class _Network(nn.Module):
    """Layers up to the hidden activations that become a stream (ReLU last), then layers to the training target."""

    def __init__(self, body: list[nn.Module], head: list[nn.Module]):
        super().__init__()
        self.body = nn.Sequential(*body, nn.ReLU())
        self.head = nn.Sequential(*head)

    def fit(self, inputs: Tensor, targets: Tensor, epochs: int, generator: torch.Generator) -> None:
        """Fit by Adam on binary cross-entropy with logits: word labels and pixels both lie in [0, 1]."""
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs), generator=generator).split(64):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(self.head(self.body(inputs[rows])), targets[rows]).backward()
                optimizer.step()

    @torch.no_grad()
    def activations(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.body(block) for block in inputs.split(512)])


_FLAT = 32 * (IMAGE_SIZE // 4) ** 2  # width after the two strided convolutions


def _convolutions() -> list[nn.Module]:
    """[B, 1, 32, 32] -> [B, _FLAT]"""
    first, second = nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    return [first, nn.ReLU(), second, nn.ReLU(), nn.Flatten()]


def _deconvolutions() -> list[nn.Module]:
    """[B, _FLAT] -> [B, 1, 32, 32]"""
    first = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
    second = nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1)
    return [nn.ReLU(), nn.Unflatten(1, (32, IMAGE_SIZE // 4, IMAGE_SIZE // 4)), first, nn.ReLU(), second]


def _name_features(names: tuple[str, ...], train_rows: Tensor, width: int, seed: int) -> Tensor:
    """Character n-gram TF-IDF of names, reduced by truncated SVD: float32 [n, width]."""
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from threadpoolctl import threadpool_limits  # a requirement of scikit-learn
    except ImportError as error:
        raise missing("this data set", "scikit-learn") from error
    tfidf = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    svd = TruncatedSVD(width, random_state=seed)
    with threadpool_limits(1):  # NumPy's threads, as in one_thread
        svd.fit(tfidf.fit_transform([names[i] for i in train_rows.tolist()]))
        return torch.from_numpy(svd.transform(tfidf.transform(names))).float()


def _split(n: int, n_test: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training and held-out rows, each ascending."""
    order = torch.randperm(n, generator=generator)
    return order[n_test:].sort().values, order[:n_test].sort().values


def _normalised(features: dict[str, Tensor], train_rows: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Centre and normalise rows; without centring the common mean dominates the top-k and 40 % of the latents die."""
    centred = {s: x[rows] - x[train_rows].mean(0) for s, x in features.items()}
    return {s: x / (x.norm(dim=1, keepdim=True) + 1e-8) for s, x in centred.items()}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(check_int("seed", seed, 0, 2**32 - 1, "as NumPy's seeds"))


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch to one CPU thread: reproducible, as fast for such small networks, and faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _seeded(seed: int):
    """Seed torch inside the context; the caller's random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
