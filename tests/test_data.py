"""The data are what they say they are, are repeatable, and the held-out rows stay unseen."""

import dataclasses
import sys
import unicodedata
from collections import Counter

import pytest
import torch

from sparc_kernels import data
from sparc_kernels.data import digits_streams, unicode_streams


@pytest.fixture(scope="module")
def rendered():
    return data._render()


@pytest.fixture(scope="module")
def quick(quick_streams):
    return quick_streams


@pytest.fixture
def few_characters(monkeypatch, rendered):
    """The first 500 characters only, so that a build takes a second. Returns what `_render` will give."""
    codepoints, images = rendered
    few = codepoints[:500], {kind: x[:500].clone() for kind, x in images.items()}
    monkeypatch.setattr(data, "_render", lambda: few)
    return few


def test_characters_that_both_fonts_draw(rendered):
    codepoints, images = rendered
    assert 2900 < len(codepoints) < 3600
    assert codepoints == sorted(set(codepoints))
    assert {ord("A"), ord("ß"), ord("☃"), 0x2801} - set(codepoints) <= {ord("☃")}
    assert ord(" ") not in codepoints and 0xFE00 not in codepoints  # without ink
    for x in images.values():
        assert x.shape == (len(codepoints), 32, 32) and x.dtype == torch.uint8
        assert (x.flatten(1).amax(1) > 100).float().mean() > 0.99
        shades = x[(x > 0) & (x < 255)]
        assert len(shades.unique()) > 100  # antialiased
    different = (images["sans"] != images["serif"]).flatten(1).any(1)
    assert different.float().mean() > 0.7  # box drawings and braille look the same in both
    assert different[codepoints.index(ord("A"))]


def test_position_in_the_cell_is_kept(rendered):
    """Left and right half blocks, superscript and subscript differ in nothing else."""
    codepoints, images = rendered
    ink = {c: images["sans"][codepoints.index(ord(c))].float() / 255 for c in "▌▐²₂"}
    columns, rows = torch.arange(32.0), torch.arange(32.0).unsqueeze(1)
    across = {c: ((x * columns).sum() / x.sum()).item() for c, x in ink.items()}
    down = {c: ((x * rows).sum() / x.sum()).item() for c, x in ink.items()}
    assert across["▌"] < 14 and across["▐"] > 17
    assert down["²"] < down["₂"] - 5


def test_unicode_streams_have_the_promised_form(quick):
    n = len(quick.characters)
    assert n == 1600 and len(quick.names) == n and quick.labels.shape == (n, len(quick.label_names))
    assert quick.d_streams == {"sans": 128, "serif": 96, "name": 128}
    assert quick.labels.dtype == torch.bool and quick.images.keys() == {"sans", "serif"}
    assert torch.cat([quick.train_rows, quick.test_rows]).sort().values.tolist() == list(range(n))
    assert len(quick.test_rows) == 300
    for part, rows in ((quick.train, quick.train_rows), (quick.test, quick.test_rows)):
        for s, x in part.items():
            assert x.shape == (len(rows), quick.d_streams[s]) and x.dtype == torch.float32
            torch.testing.assert_close(x.norm(dim=1), torch.ones(len(rows)))
    assert torch.equal(quick.train_labels, quick.labels[quick.train_rows])
    assert torch.equal(quick.test_labels, quick.labels[quick.test_rows])
    with pytest.raises(dataclasses.FrozenInstanceError):
        quick.labels = None


def test_labels_are_the_frequent_words_of_the_names(quick):
    assert all(unicodedata.name(c) == name for c, name in zip(quick.characters, quick.names, strict=True))
    words = [set(name.replace("-", " ").split()) for name in quick.names]
    counts = Counter(word for row in words for word in row)
    assert set(quick.label_names) == {word for word, count in counts.items() if count >= 15}
    assert [counts[word] for word in quick.label_names] == sorted((counts[w] for w in quick.label_names), reverse=True)
    for row in range(0, 1600, 37):
        got = {word for word, has in zip(quick.label_names, quick.labels[row].tolist(), strict=True) if has}
        assert got == words[row] & set(quick.label_names)


def test_every_stream_knows_something_of_the_labels(quick):
    """A held-out character shares far more labels with its nearest neighbour in training than with any other."""
    train, test = quick.train_labels.float(), quick.test_labels.float()
    union = train.sum(1) + test.sum(1, keepdim=True) - test @ train.T
    overlap = (test @ train.T) / union.clamp_min(1)
    for s in quick.train:
        nearest = (quick.test[s] @ quick.train[s].T).argmax(1, keepdim=True)
        assert overlap.gather(1, nearest).mean() > 2 * overlap.mean(), s


def test_same_seed_same_bits_and_the_callers_random_state_is_left_alone(few_characters):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = unicode_streams(5, quick=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again, other = unicode_streams(5, quick=True), unicode_streams(6, quick=True)
    for s in first.train:
        assert torch.equal(first.train[s], again.train[s]) and torch.equal(first.test[s], again.test[s])
    assert torch.equal(first.test_rows, again.test_rows) and not torch.equal(first.test_rows, other.test_rows)


def test_held_out_pictures_do_not_reach_the_networks(few_characters):
    clean = unicode_streams(0, quick=True)
    _, images = few_characters
    for x in images.values():
        x[clean.test_rows] = 255 - x[clean.test_rows]
    spoilt = unicode_streams(0, quick=True)
    assert torch.equal(spoilt.test_rows, clean.test_rows)
    for s in ("sans", "serif"):
        assert torch.equal(spoilt.train[s], clean.train[s])
        assert not torch.allclose(spoilt.test[s], clean.test[s], atol=0.1)


def test_held_out_names_do_not_reach_the_text_features(quick):
    spoilt = list(quick.names)
    for row in quick.test_rows.tolist():
        spoilt[row] = "ZZZ QQQ XXX"
    features = [data._name_features(tuple(names), quick.train_rows, 16, 0) for names in (quick.names, spoilt)]
    assert torch.equal(features[0][quick.train_rows], features[1][quick.train_rows])
    assert not torch.equal(features[0], features[1])


def test_digits():
    digits = digits_streams(1)
    assert digits.d_streams == {"pixels": 64, "classifier": 48, "autoencoder": 32}
    assert len(digits.train_rows) == 1500 and len(digits.test_rows) == 297
    assert digits.images["pixels"].shape == (1797, 8, 8) and digits.images["pixels"].dtype == torch.uint8
    assert (digits.labels.sum(1) == 1).all()
    for row in (0, 7, 1796):
        assert digits.label_names[digits.labels[row].int().argmax()] == unicodedata.name(digits.characters[row])
    for s, x in digits.test.items():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.norm(dim=1), torch.ones(297))
        nearest = (x @ digits.train[s].T).argmax(1)
        right = (digits.train_labels[nearest] & digits.test_labels).any(1).float().mean()
        assert right > 0.8, s
    again = digits_streams(1)
    assert all(torch.equal(digits.train[s], again.train[s]) for s in digits.train)


@pytest.mark.parametrize(("package", "name"), [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")])
def test_a_missing_package_is_named(monkeypatch, package, name, few_characters):
    if package == "matplotlib":
        monkeypatch.undo()
    loaded = [m for m in sys.modules if m.startswith(f"{package}.")]
    for module in [package, *loaded]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"this data set needs {name}: pip install {name}$"):
        unicode_streams(0, quick=True)


@pytest.mark.parametrize("build", [unicode_streams, digits_streams])
@pytest.mark.parametrize("seed", [-1, 1.5, None])
def test_bad_seeds_are_refused(build, seed):
    with pytest.raises(ValueError, match="seed: expected an int in"):
        build(seed)
