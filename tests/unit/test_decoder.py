"""What scoring and greedy writing mean for every engine that gives logits, with a decoder whose logits are a table."""

import numpy as np
import pytest
import torch

from prunus.engines.inside.decoder import generate, score

VOCABULARY = 11
TABLE_VV = np.random.default_rng(0).normal(0, 3, (VOCABULARY, VOCABULARY)).astype(np.float32)


class Bigrams:
    """The logits after a token are its row of the table; `read` keeps what was asked."""

    def __init__(self):
        self.read = []

    def window(self, tokens):
        self.read.append(("window", list(tokens)))
        return TABLE_VV[tokens]

    def prompt(self, tokens):
        self.read.append(("prompt", list(tokens)))
        return TABLE_VV[tokens[-1]]

    def step(self, token):
        self.read.append(("step", token))
        return TABLE_VV[token]


def test_scores_are_those_of_torch(tmp_path):
    windows, file = [[1, 4, 4, 9, 0], [7, 2, 10]], tmp_path / "logits.npy"
    told = score(Bigrams(), {"windows": windows, "keep": 3, "logits": str(file)})
    for window, nll in zip(windows, told["nll"], strict=True):
        logits_TV = torch.from_numpy(TABLE_VV[window[:-1]])
        expected = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(window[1:]), reduction="none")
        torch.testing.assert_close(torch.tensor(nll), expected)
    np.testing.assert_array_equal(np.load(file), TABLE_VV[windows[0][:3]])  # of the first window, the first rows


def test_logits_that_are_large_do_not_overflow(tmp_path):
    model = Bigrams()
    model.window = lambda tokens: np.full((len(tokens), VOCABULARY), 1e4, np.float32)
    told = score(model, {"windows": [[1, 2]], "keep": 1, "logits": str(tmp_path / "logits.npy")})
    assert told["nll"][0] == [pytest.approx(np.log(VOCABULARY))]


def test_greedy_tokens_come_one_by_one_and_each_is_read_once():
    model = Bigrams()
    told = generate(model, {"prompt": [3, 5], "new_tokens": 4})
    expected = [5]
    for _ in range(4):
        expected.append(int(TABLE_VV[expected[-1]].argmax()))
    assert told["tokens"] == expected[1:]
    assert model.read == [("prompt", [3, 5]), *(("step", token) for token in expected[1:-1])]
    assert len(told["steps"]) == 3
    assert 0 < told["prefill"] <= told["first_token"]


def test_one_token_takes_no_step():
    model = Bigrams()
    told = generate(model, {"prompt": [3], "new_tokens": 1})
    assert (told["tokens"], told["steps"]) == ([int(TABLE_VV[3].argmax())], [])
    assert model.read == [("prompt", [3])]
