"""Conversations as tokens and positions, and what of them the Talker is given."""

from __future__ import annotations

import shutil

import pytest
import torch
from qwen_loop import FULL, TINY

from mstar.errors import InvalidRequest, WeightsError
from mstar.models.base import Inputs
from mstar.models.qwen3_omni.positions import interleaving, of_video_with_sound
from mstar.models.qwen3_omni.prompt import Heard, Pictured, chat_pieces, lay_out
from mstar.models.qwen3_omni.speech import OPENING, speaker_id, user_rows
from mstar.models.qwen3_omni.template import check_template
from mstar.models.qwen3_omni.tokenizer import Tokenizer
from mstar.models.qwen3_omni.vision import Grid
from mstar.models.turns import turns_of

KINDS = ("text", "image", "audio", "video")


def turns(*messages):
    return turns_of(Inputs(messages=[{"role": r, "content": c} for r, c in messages]), KINDS)


# -- the tokenizer -------------------------------------------------------------------------------


def test_both_forms_of_the_tokenizer_are_one(tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    whole, apart = Tokenizer(TINY), Tokenizer(tmp_path)
    text = "<|im_start|>user\nHello, there  you're 123!\n\n Ünïcode e\u0301 漢字<|im_end|>\n<think>"
    assert apart.encode(text) == whole.encode(text)
    assert apart.decode(apart.encode(text)) == whole.decode(whole.encode(text))
    assert apart.size == whole.size == 438


def test_faults_of_tokenizers_are_told(tmp_path):
    with pytest.raises(WeightsError, match=r"no tokenizer\.json.*vocab\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="no tokenizer can be made"):
        Tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match="surrogate"):
        Tokenizer(TINY).encode("a\ud800")


def test_the_tokenizer_for_dummy_weights_has_the_published_marks():
    tokenizer = Tokenizer(FULL)
    text = "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
    text += "<|im_start|>assistant"
    published = [151644, 872, 198, 151669, 151675, 151670, 151645, 198, 151644, 77091]
    assert tokenizer.encode(text) == published
    assert tokenizer.encode("<|image_pad|><tts_pad>") == [151655, 151671]
    said = "Any text: é, 漢字."
    assert tokenizer.decode(tokenizer.encode(said)) == said


# -- the layout ----------------------------------------------------------------------------------


def test_the_chat_template(loop):
    said = turns(("system", "S"), ("user", [{"type": "text", "text": "a"}]), ("assistant", "b"))
    whole = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
    whole += "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n"
    assert list(chat_pieces(said, [])) == [whole]
    silent = list(chat_pieces(said, [], enable_thinking=False))
    assert silent == [whole + "<think>\n\n</think>\n\n"]


def test_a_checkpoint_with_another_template_is_told(tmp_path, caplog):
    check_template(TINY)
    check_template(FULL)  # has none
    assert not caplog.messages
    text = (TINY / "chat_template.json").read_text()
    for change in (("|>assistant", "|>model"), ("{%- endif", "{%- end")):
        (tmp_path / "chat_template.json").write_text(text.replace(*change))
        check_template(tmp_path)
    another, broken = caplog.messages
    assert str(tmp_path) in another
    assert "not the published one" in another
    assert "cannot be read" in broken


def test_media_stand_between_their_marks():
    said = turns(("user", [{"type": k, k: b""} for k in ("image", "audio", "video", "video")]))
    grid = Grid(1, 2, 2)
    media = [Pictured(grid), Heard(3), Pictured(grid, 1.0), Pictured(grid, 1.0, 5)]
    pieces = list(chat_pieces(said, media))
    assert pieces[1::2] == media
    assert pieces[0] == "<|im_start|>user\n<|vision_start|>"
    assert pieces[2] == "<|vision_end|><|audio_start|>"
    assert pieces[4] == "<|audio_end|><|vision_start|>"
    assert pieces[6] == "<|vision_end|><|vision_start|><|audio_start|>"
    assert pieces[8].startswith("<|audio_end|><|vision_end|><|im_end|>\n")


def test_the_video_comes_first_where_times_are_equal():
    grid = Grid(3, 2, 2)  # at 0, 6.5 and 13
    order = interleaving(grid, 2, 0.5, 13, 15).long().tolist()
    assert order == [1, *[0] * 7, 1, *[0] * 6, 1, 0, 0]


def test_what_follows_a_video_with_sound_depends_on_which_is_longer():
    long = of_video_with_sound(10.0, Grid(2, 2, 2), 2, 1.0, 13.0, 3)  # the video ends later
    assert long[1] == 10 + 13 + 1
    short = of_video_with_sound(10.0, Grid(2, 2, 2), 2, 1.0, 13.0, 40)
    assert short[1] == 10 + 39 + 1
    wide = of_video_with_sound(10.0, Grid(1, 2, 120), 2, 1.0, 13.0, 5)  # its width is not counted
    assert wide[1] == 10 + 4 + 1


# -- for the Talker ------------------------------------------------------------------------------


def test_only_the_users_turns_are_given(loop):
    said = turns(
        ("system", "s"),
        ("user", [{"type": "text", "text": "Hello"}, {"type": "audio", "audio": b""}]),
        ("assistant", "It goes up."),
        ("user", [{"type": "image", "image": b""}]),
    )
    grid = Grid(1, 4, 6)
    segments = lay_out(said, [Heard(4), Pictured(grid)], loop.tokenizer, loop.config.thinker)
    ids = [token for segment in segments for token in segment.ids]
    user = user_rows(segments, loop.config)
    text = loop.tokenizer.decode([ids[row] for row in user.rows])
    assert text == "user\nHello\nuser\n\n"
    assert int(user.is_medium.sum()) == 4 + 6
    assert user.ids[-OPENING:] == [loop.config.tts_pad_token_id] * OPENING
    assert user.ids[:-OPENING] == [ids[row] for row in user.rows]
    assert user.positions.shape == (3, len(user.rows) + OPENING)
    before = user.rows.index(
        next(r for r in user.rows if ids[r] == loop.config.thinker.image_token_id)
    )
    assert (
        user.positions[:, : before + 1].tolist() == torch.arange(before + 1).expand(3, -1).tolist()
    )
    assert user.next_position == before + 3 + 3 + OPENING  # 3 columns, then 3 marks and the opening


def test_voices_are_found_in_any_case(loop):
    config = loop.omni.talker.config
    assert speaker_id(config, "ETHAN") == speaker_id(config, "Ethan") == 302
    for voice in ("nobody", None, 3):
        with pytest.raises(InvalidRequest, match="one of Aiden, Chelsie, Ethan"):
            speaker_id(config, voice)


def test_codes_that_are_never_said(loop):
    talker = loop.omni.talker
    logits = talker.logits(torch.zeros(1, talker.config.text.hidden_size))[0]
    said = logits.isfinite().nonzero().flatten().tolist()
    assert said == [*range(128), talker.config.codec_eos_token_id]
