"""Text: where it comes from, its split, its batches."""

import sys

import pytest
import torch

from scripts.text import batch, decode, load_corpus, text_files


def test_default_text_is_this_pythons_library_and_repeats():
    one, two = load_corpus(limit=300_000), load_corpus(limit=300_000)
    assert one.train.equal(two.train) and one.held_out.equal(two.held_out)
    assert one.files > 5
    assert one.train.numel() + one.held_out.numel() == 300_000
    assert b"def " in bytes(one.train.tolist())
    assert f"{sys.version_info.major}" and "library" in one.source


def test_held_out_is_the_last_tenth_of_every_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 1800 + b"A" * 200)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.rst").write_bytes(b"b" * 900 + b"B" * 100)
    corpus = load_corpus(tmp_path)
    assert sorted(set(decode(corpus.train))) == ["a", "b"]
    assert sorted(set(decode(corpus.held_out))) == ["A", "B"]
    assert corpus.files == 2


def test_a_single_file_of_any_suffix(tmp_path):
    file = tmp_path / "words.log"
    file.write_text("0123456789" * 500)
    corpus = load_corpus(file, limit=3000)
    assert decode(torch.cat((corpus.train, corpus.held_out))) == "0123456789" * 300


def test_binary_and_foreign_files_are_left_out(tmp_path):
    (tmp_path / "good.py").write_bytes(b"x = 1\n" * 500)
    (tmp_path / "binary.txt").write_bytes(b"\0" * 5000)
    (tmp_path / "image.png").write_bytes(b"p" * 5000)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_bytes(b"t" * 5000)
    assert [file.name for file in text_files(tmp_path) if file.name != "binary.txt"] == ["good.py"]
    assert set(decode(load_corpus(tmp_path).train)) == set("x = 1\n")


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="text must be a file or folder"):
        load_corpus(tmp_path / "none")
    with pytest.raises(ValueError, match=r"at least 2000 bytes, got 0 .*--text"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="longer than length = 8, got 5 bytes"):
        batch(torch.zeros(5, dtype=torch.uint8), 1, 8, 0, 0)


def test_targets_are_the_next_bytes_and_batches_repeat():
    data = torch.arange(200, dtype=torch.uint8)
    tokens, targets = batch(data, 4, 16, seed=3, step=5)
    assert tokens.shape == targets.shape == (4, 16) and tokens.dtype == torch.int64
    assert targets.equal(tokens + 1)
    assert batch(data, 4, 16, seed=3, step=5)[0].equal(tokens)
    assert not batch(data, 4, 16, seed=3, step=6)[0].equal(tokens)
    assert not batch(data, 4, 16, seed=4, step=5)[0].equal(tokens)


def test_every_position_can_be_drawn():
    data = torch.arange(10, dtype=torch.uint8)
    seen = {int(t) for step in range(40) for t in batch(data, 8, 4, 0, step)[1].flatten()}
    assert seen == set(range(1, 10))
