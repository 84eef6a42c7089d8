"""Streamed text: exact, never a split character, never a piece of a stop string."""

import numpy as np
import pytest
from fake_engine import decoders_alphabet, make_tokenizer
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

import flashmoe
from flashmoe.checkpoint.tokenizer import Tokenizer
from flashmoe.generate.text import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> Library:
    return make_tokenizer()


def _pieces(tokenizer: Library, ids: list[int], stop: str | list[str] | None = None) -> list[str]:
    stream = TextStream(Tokenizer(tokenizer), stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


def _bytewise(tokenizer: Library, text: str) -> list[int]:
    table = decoders_alphabet()
    return [tokenizer.token_to_id(table[byte]) for byte in text.encode()]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_ids_add_up_to_the_decoded_text(tokenizer: Library, seed: int) -> None:
    # Random ids are mostly invalid UTF-8, with special tokens and ids of no token among them.
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, tokenizer.get_vocab_size() + 5, 200).tolist()
    assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_is_given_whole_when_its_last_byte_is_there(tokenizer: Library) -> None:
    text = "aé€😀z"
    assert _pieces(tokenizer, _bytewise(tokenizer, text)) == [
        *("a", "", "é", "", "", "€", "", "", "", "😀", "z"),
        "",
    ]


def test_an_unfinished_character_is_flushed_as_the_decoder_would(tokenizer: Library) -> None:
    ids = _bytewise(tokenizer, "a😀")[:-1]
    assert _pieces(tokenizer, ids)[-1] == "\ufffd"
    assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_added_token_is_text_and_a_special_one_is_not(tokenizer: Library) -> None:
    ids = [tokenizer.token_to_id("<think>"), tokenizer.token_to_id("<|im_end|>")]
    assert _pieces(tokenizer, ids) == ["<think>", "", ""]


def test_a_stop_string_that_spans_tokens_and_characters_is_not_given(tokenizer: Library) -> None:
    pieces = _pieces(tokenizer, _bytewise(tokenizer, "ab é€ cd"), stop="é€")
    assert "".join(pieces) == "ab "


def test_text_that_might_begin_a_stop_string_is_held_until_it_does_not(
    tokenizer: Library,
) -> None:
    ids = _bytewise(tokenizer, "a END b")
    assert _pieces(tokenizer, ids, stop="ENDE") == ["a", " ", "", "", "", "END ", "b", ""]


def test_what_is_held_at_the_end_is_given(tokenizer: Library) -> None:
    assert _pieces(tokenizer, _bytewise(tokenizer, "a EN"), stop="END")[-1] == "EN"


@pytest.mark.parametrize("text", ["xaabaabaac", "aabaaabaabaac", "zzaabaaczz"])
def test_a_stop_string_that_overlaps_itself_is_found(tokenizer: Library, text: str) -> None:
    pieces = _pieces(tokenizer, _bytewise(tokenizer, text), stop="aabaac")
    assert "".join(pieces) == text.partition("aabaac")[0]


def test_the_first_of_several_stop_strings_counts(tokenizer: Library) -> None:
    pieces = _pieces(tokenizer, _bytewise(tokenizer, "one two three"), stop=["three", "tw"])
    assert "".join(pieces) == "one "


@pytest.mark.parametrize("seed", range(10))
def test_random_text_is_cut_where_python_would_cut_it(tokenizer: Library, seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("abé"), 60))
    stops = ["".join(rng.choice(list("abé"), n)) for n in (3, 4, 5)]
    ids = tokenizer.encode(text).ids
    found = [text.index(stop) for stop in stops if stop in text]
    assert "".join(_pieces(tokenizer, ids, stops)) == text[: min(found, default=len(text))]


@pytest.mark.parametrize("stop", ["", ["a", ""], [1]])
def test_a_stop_that_is_not_text_is_refused(tokenizer: Library, stop: object) -> None:
    with pytest.raises(flashmoe.ArgumentError, match="stop"):
        TextStream(Tokenizer(tokenizer), stop)  # type: ignore[arg-type]


def test_a_missing_damaged_or_other_tokenizer_is_named(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(flashmoe.CheckpointError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    path.write_text("{")
    with pytest.raises(
        flashmoe.CheckpointError, match=r"tokenizer\.json: the tokenizer is damaged"
    ):
        Tokenizer.load(tmp_path)
    other = Library(models.BPE())
    other.decoder = decoders.Metaspace()
    other.save(str(path))
    with pytest.raises(flashmoe.CheckpointError, match="Metaspace"):
        Tokenizer.load(tmp_path)
