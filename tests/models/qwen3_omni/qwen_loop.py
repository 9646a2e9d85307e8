"""Qwen3-Omni without the engine: one request from media to waveform, step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mstar.engine.layers.attention import GrowingContext
from mstar.models import qwen3_omni
from mstar.models.base import Inputs
from mstar.models.qwen3_omni.mel import log_mel
from mstar.models.qwen3_omni.networks import load_networks
from mstar.models.qwen3_omni.pixels import IMAGES, PixelRule, normalised, resized, to_patches
from mstar.models.qwen3_omni.prompt import Heard, Pictured, lay_out
from mstar.models.qwen3_omni.speech import Speaker, speaker_id, user_rows
from mstar.models.qwen3_omni.tokenizer import Tokenizer
from mstar.models.turns import turns_of

TINY = Path(qwen3_omni.__file__).parent / "tiny" / "qwen3_omni"
FULL = Path(qwen3_omni.__file__).parent / "full" / "qwen3_omni"
SMALL_VIDEOS = PixelRule(1024, 786432)  # with which the goldens were made


class Loop:
    """The tiny checkpoint, and what was seen on the way of the last request, by golden name."""

    def __init__(self) -> None:
        found = load_networks(TINY, device="cpu", dtype=torch.float32)
        self.omni, self.vocoder = found.omni, found.vocoder
        self.config = self.omni.config
        self.tokenizer = Tokenizer(TINY)
        newline = self.tokenizer.encode("\n")[0]
        self.speaker = Speaker(self.omni.thinker, self.omni.talker, self.config, newline)
        self.seen: dict[str, torch.Tensor] = {}

    # -- media -----------------------------------------------------------------------------------

    def hear(self, waveform: np.ndarray) -> tuple[Heard, torch.Tensor]:
        features = self.seen["audio0.features"] = log_mel(waveform)
        rows = self.seen["audio_tower_out"] = self.omni.audio(features, [features.shape[1]])
        return Heard(self.omni.audio.config.tokens(features.shape[1])), rows

    def look(self, pixels, grid, kind):
        seen = self.omni.vision(pixels, [grid])
        self.seen[f"{kind}.pixel_values"] = pixels
        self.seen[f"{kind}.grid_thw"] = torch.tensor([grid])
        self.seen[f"{kind}.tower_last_hidden"] = seen.hidden
        self.seen[f"{kind}.tower_merged"] = seen.rows
        for index, features in enumerate(seen.features):
            self.seen[f"{kind}.deepstack{index}"] = features
        return self.omni.thinker.wide(seen.rows, seen.features)

    def patches(self, frames, rule):
        config = self.config.thinker.vision
        images = [np.asarray(resized(Image.fromarray(frame), rule, config)) for frame in frames]
        return to_patches(np.stack(images), config)

    # -- the request -----------------------------------------------------------------------------

    def run(
        self, messages, *, image=None, sound=None, video=None, fps=None, together=False, pixels=None
    ):
        """Answer and speak; returns the answer's text, and the samples.

        `pixels` are taken for those of the image.
        """
        self.seen = {}
        media, rows = {}, {}
        if sound is not None:
            media["audio"], heard = self.hear(sound)
            rows["audio"] = self.omni.thinker.wide(heard)
        if image is not None:
            patches, grid = self.patches(image[None], IMAGES)
            media["image"] = Pictured(grid)
            pixels = normalised(patches) if pixels is None else pixels
            rows["image"] = self.look(pixels, grid, "image")
        if video is not None:
            patches, grid = self.patches(video, SMALL_VIDEOS)
            sounds = media.pop("audio").tokens if together else 0
            media["video"] = Pictured(grid, 2 / fps, sounds)
            rows["video"] = self.look(normalised(patches), grid, "video")
        turns = turns_of(Inputs(messages=messages), ("text", "image", "audio", "video"))
        kinds = [part.kind for turn in turns for part in turn.parts if part.kind != "text"]
        segments = lay_out(
            turns, [media[kind] for kind in kinds], self.tokenizer, self.config.thinker
        )
        answer = self.write(segments, rows, iter(kinds))
        return self.tokenizer.decode(answer), self.speak(segments, answer)

    def write(self, segments, rows, kinds) -> list[int]:
        thinker, seen = self.omni.thinker, self.seen
        size = self.config.thinker.text.hidden_size
        inputs = []
        for segment in segments:
            if segment.medium is None:
                inputs.append(thinker.embed(torch.tensor(segment.ids)))
            elif segment.is_video is None:
                inputs.append(rows[next(kinds)])
            else:
                next(kinds)
                both = torch.empty(len(segment.ids), rows["video"].shape[1])
                both[segment.is_video], both[~segment.is_video] = rows["video"], rows["audio"]
                inputs.append(both)
        self.inputs = inputs = torch.cat(inputs)
        ids = [token for segment in segments for token in segment.ids]
        positions = torch.cat([segment.positions for segment in segments], 1)
        seen["input_ids"], seen["thinker_position_ids"] = torch.tensor(ids), positions
        seen["thinker_inputs_embeds"] = inputs[:, :size]
        kv = GrowingContext()
        hidden = thinker(inputs, positions, kv)
        self.accepted = [thinker.accepted(hidden)]
        finals, answer = [hidden[-1:, :size]], []
        logits = [thinker.logits(hidden[-1:])]
        place, places = float(positions.max()) + 1, []
        while True:
            answer.append(int(logits[-1].argmax()))
            if answer[-1] == self.config.im_end_token_id:
                break
            inputs = thinker.embed(torch.tensor(answer[-1:]))
            hidden = thinker(inputs, torch.tensor([place]), kv)
            places.append(place)
            place += 1
            self.accepted.append(thinker.accepted(hidden))
            finals.append(hidden[:, :size])
            logits.append(thinker.logits(hidden))
        seen["thinker_generated"] = torch.tensor(answer)
        seen["thinker_decode_position_ids"] = torch.tensor(places).expand(3, -1)
        seen["thinker_hidden_accept"] = torch.cat(self.accepted)
        seen["thinker_hidden_final"] = torch.cat(finals)
        seen["thinker_logits"] = torch.cat([logits[0], logits[1], logits[-1]])
        return answer

    def speak(self, segments, answer) -> torch.Tensor:
        talker, seen, speaker = self.omni.talker, self.seen, self.speaker
        user = user_rows(segments, self.config)
        size = self.config.thinker.text.hidden_size
        rows = torch.tensor(user.rows)
        accepted = self.accepted[0][rows[user.is_medium]]
        own = speaker.user(user, self.inputs[rows, :size], accepted)
        opening = speaker.opening(speaker_id(talker.config, "Ethan"), answer[0])
        inputs = torch.cat([own, opening])
        trailing = speaker.text([*answer[1:-1], self.config.tts_eos_token_id])
        seen["talker_input_ids"] = torch.tensor(user.ids)
        seen["talker_inputs_embeds"], seen["talker_position_ids"] = inputs, user.positions
        seen["talker_trailing_text_hidden"] = trailing
        seen["talker_tts_pad_embed"] = speaker.pad
        kv, positions, place = GrowingContext(), user.positions, user.next_position
        frames, logits, states, fed, places = [], [], [], [], []
        said = torch.zeros(talker.vocab_size, dtype=torch.bool)
        while True:
            hidden = talker(inputs, positions, kv)[-1:]
            states.append(hidden)
            logits.append(talker.scores(hidden))
            scores = talker.logits(hidden)
            scores = torch.where(said & (scores > 0), scores / 1.05, scores)
            scores = torch.where(said & (scores < 0), scores * 1.05, scores)
            first = scores.argmax(-1)
            if int(first) == talker.config.codec_eos_token_id:
                break
            said[first] = True
            kept: list[torch.Tensor] = []
            seen[f"cp{len(frames)}.inputs_embeds"] = torch.cat([hidden, talker.embed(first)])
            rest = talker.code_predictor(
                hidden, talker.embed(first), lambda scores: scores.argmax(-1), keep=kept
            )
            seen[f"cp{len(frames)}.logits"] = torch.cat(kept)
            seen[f"cp{len(frames)}.codes"] = rest[0]
            codes = torch.cat([first[None], rest], 1)
            text = trailing[len(frames)] if len(frames) < len(trailing) else speaker.pad
            inputs = talker.frame_inputs(codes, text[None])
            positions = torch.tensor([place])
            place += 1
            frames.append(codes)
            fed.append(inputs)
            places.append(positions)
        seen["talker_hidden_last"] = torch.cat(states)
        seen["talker_logits"] = torch.cat([logits[0], logits[1], *logits[-2:]])
        seen["talker_decode_inputs_embeds"] = torch.cat(fed)
        seen["talker_decode_position_ids"] = torch.cat(places).expand(3, -1)
        seen["codes"] = torch.cat(frames).T
        wave = seen["wav"] = self.vocoder(seen["codes"][None])[0]
        seen["wav_head"], seen["wav_tail"] = wave[:6000], wave[-6000:]
        return wave
