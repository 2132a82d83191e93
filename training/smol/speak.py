"""Stage B of smol-vlm: connector and low-rank adapters learn to answer; decoder and tower stay as
they are.

Captions and questions about one picture, in chats of several turns; an object is added when both
are good enough, and the other worlds join at five and six objects. The kept checkpoint has the
highest mean of the validation accuracies on `refer`, `compare` and `hop`; no head is looked at.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corelens.data.synthetic import synthetic
from training.blind import HeadDropout
from training.smol.adapters import adapt
from training.smol.asked import Chat, draw_chat
from training.smol.see import squeeze
from training.smol.tower import build_tower, features, pixels_of

CHECKED = ("refer", "compare", "hop")
TOKENS = 64
_LEVELS = 6
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Speaker:
    """The parts of smol-vlm in training. `lookup`: the decoder's embeddings; `around`: the
    embedding of the three tokens around a picture, the mean of all (no answer is ever one of
    them)."""

    def __init__(self, decoder: Any, tokenizer: Any, tower_state: Path) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        decoder.requires_grad_(False)
        # quicker here than the fused kernels, but needs a mask
        decoder.set_attn_implementation("eager")
        self.tower, self.connector = build_tower(decoder.config)
        with safe_open(tower_state, "pt") as file:
            for name, part in (("tower", self.tower), ("connector", self.connector)):
                for key, weight in part.named_parameters():
                    weight.data.copy_(file.get_tensor(f"{name}.{key}"))
        self.tower.requires_grad_(False)
        self.adapters = adapt(decoder.model)
        self.dropout = HeadDropout(decoder.model, decoder.config.num_attention_heads)
        self.lookup = decoder.get_input_embeddings().weight
        self.around = self.lookup.float().mean(0).to(self.lookup.dtype)
        self._opening = self._ids("<|im_start|>user\n")
        self.learns = nn.ModuleDict({"connector": self.connector, "adapters": self.adapters})

    def trained(self) -> dict[str, Tensor]:
        """The weights that learn, by name."""
        frozen = {id(weight) for weight in self.decoder.parameters()} - {
            id(weight) for part in self.adapters.values() for weight in (part.down, part.up)
        }
        return {
            name: weight
            for name, weight in self.learns.named_parameters()
            if id(weight) not in frozen
        }

    def rest(self, below: int) -> None:
        """From now on connector and adapters of the first `below` layers stay as they are: no
        gradient goes there."""
        self.connector.requires_grad_(below == 0)
        for name, part in self.adapters.items():
            for weight in (part.down, part.up):
                weight.requires_grad_(int(name.split(":")[0]) >= below)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def rows(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """Ids behind the picture and which of them the assistant says."""
        ids: list[int] = []
        spoken: list[bool] = []
        for i, (user, assistant) in enumerate(turns):
            before = self._ids(
                ("" if not i else "<|im_start|>user\n")
                + f"{user}<|im_end|>\n<|im_start|>assistant\n"
            )
            after = self._ids(f"{assistant}<|im_end|>")
            ids += before + after + self._ids("\n")
            spoken += [False] * len(before) + [True] * len(after) + [False]
        return ids, spoken

    def run(self, chats: Sequence[Chat]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [spoken, vocabulary] at the tokens that the assistant says, the right ids
        [spoken], and the row of each [spoken]."""
        with torch.no_grad():
            hidden = features(self.tower, pixels_of(np.stack([chat.image for chat in chats])))
        visual = self.connector(hidden).to(self.lookup.dtype)
        texts = [self.rows(chat.turns) for chat in chats]
        length = max(len(ids) for ids, _ in texts)
        ids, spoken = (
            torch.full((len(chats), length), 2),
            torch.zeros(len(chats), length, dtype=torch.bool),
        )
        for row, (tokens, marks) in enumerate(texts):
            ids[row, : len(tokens)], spoken[row, : len(tokens)] = (
                torch.tensor(tokens),
                torch.tensor(marks),
            )
        opening = self.lookup[self._opening].expand(len(chats), -1, -1)
        around = self.around.expand(len(chats), 1, -1)
        embedded = torch.cat([opening, around, around, visual, around, self.lookup[ids]], 1)
        start = embedded.shape[1] - length
        shape = (1, 1, embedded.shape[1], embedded.shape[1])
        causal = torch.full(shape, torch.finfo(embedded.dtype).min, dtype=embedded.dtype).triu(1)
        out = self.decoder.model(
            inputs_embeds=embedded, attention_mask=causal, use_cache=False
        ).last_hidden_state
        predicts = out[:, start - 1 : -1][spoken]
        return F.linear(predicts, self.lookup).float(), ids[spoken], spoken.nonzero()[:, 0]


def validation(speaker: Speaker, n: int, seed: int, batch: int = 25) -> dict[str, float]:
    """Exact match on `n` validation scenes of each world (teacher-forced: greedy decoding says the
    same)."""
    shares = {}
    for world in CHECKED:
        samples = synthetic(world, n, seed=seed, split="validation")
        right = 0
        for first in range(0, n, batch):
            part = samples[first : first + batch]
            chats = [
                Chat(squeeze(s.images[0]), [(str(s.question), str(s.answer))], world) for s in part
            ]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                logits, gold, row = speaker.run(chats)
            wrong = set(row[logits.argmax(-1) != gold].tolist())
            right += len(chats) - len(wrong)
        shares[world] = right / n
    return shares


def speak(
    out: Path,
    decoder: Any,
    tokenizer: Any,
    steps: int,
    seed: int = 0,
    batch: int = 16,
    rate: float = 6e-4,
    heads_dropped: float = 0.1,
    check_every: int = 150,
    below: int = 0,
) -> None:
    """Train for `steps`; state, log and best weights in `out`, resumed where they are. `below`: the
    first layers that rest (with the connector), and cost no backward pass."""
    torch.manual_seed(seed)
    speaker = Speaker(decoder, tokenizer, out / "tower.safetensors")
    trained = speaker.trained()
    connector = [w for name, w in trained.items() if name.startswith("connector")]
    adapters = [w for name, w in trained.items() if not name.startswith("connector")]
    groups = [{"params": connector, "factor": 3.0}, {"params": adapters, "factor": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    progress: dict[str, Any] = {
        "step": 0,
        "seconds": 0.0,
        "level": 2,
        "caption": [],
        "first": [],
        "best": -1.0,
    }
    state = out / "state.safetensors"
    if state.exists():
        with safe_open(state, "pt") as file:
            progress |= json.loads(file.metadata()["progress"])
            for name, weight in trained.items():
                weight.data.copy_(file.get_tensor(name))
                moments = {key: file.get_tensor(f"{key}/{name}") for key in _MOMENTS}
                optimizer.state[weight] = {"step": torch.tensor(float(progress["step"])), **moments}
    speaker.rest(below)
    began, saved = time.time() - progress["seconds"], time.time()
    while progress["step"] < steps:
        step, level = progress["step"], progress["level"]
        chats = [draw_chat(seed, step, row, level) for row in range(batch)]
        speaker.dropout.share = heads_dropped if level >= 4 else 0.0
        now = (
            rate
            * min(1.0, (step + 1) / 30)
            * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * step / steps)))
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits, gold, row = speaker.run(chats)
        loss = F.cross_entropy(logits, gold)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = now * group["factor"]
        optimizer.step()
        optimizer.zero_grad()
        progress |= {"step": step + 1, "seconds": time.time() - began}
        right = logits.argmax(-1) == gold
        shares = {}
        for world in ("caption", "refer", "hard", "compare", "hop"):
            of_world = torch.tensor([chats[i].world == world for i in row.tolist()])
            if of_world.any():
                shares[world] = right[of_world].float().mean().item()
        # What counts is the first answer of a chat: later ones can be had by leaving out earlier
        # ones.
        firsts = [int((row == i).nonzero()[0]) for i in range(batch) if chats[i].world == "refer"]
        shares["first"] = right[firsts].float().mean().item()
        for form in ("caption", "first"):
            if form in shares:
                progress[form] = [*progress[form], shares[form]][-8:]
        bars = {"caption": 0.74, "first": 0.85}
        if level < _LEVELS and all(
            len(progress[k]) == 8 and np.mean(progress[k]) > bar for k, bar in bars.items()
        ):
            progress |= {"level": level + 1, "caption": [], "first": []}
        if step % 10 == 0:
            line = {
                "step": step + 1,
                "level": level,
                "loss": loss.item(),
                "norm": norm.item(),
                **shares,
            }
            _log(out, line | {"seconds": progress["seconds"]})
        if (step + 1) % check_every == 0 or step + 1 == steps:
            accuracies = validation(speaker, 60, seed)
            mean = sum(accuracies.values()) / len(accuracies)
            _log(
                out,
                {
                    "step": step + 1,
                    "validation": mean,
                    **accuracies,
                    "seconds": time.time() - began,
                },
            )
            if mean >= progress["best"]:
                progress |= {"best": mean, "best_step": step + 1}
                tensors = {name: weight.detach().clone() for name, weight in trained.items()}
                _save(out / "best.safetensors", tensors, progress)
        if time.time() - saved > 240 or (step + 1) % check_every == 0 or step + 1 == steps:
            tensors = {name: weight.detach().clone() for name, weight in trained.items()}
            for name, weight in trained.items():
                for key in _MOMENTS:
                    tensors[f"{key}/{name}"] = optimizer.state[weight][key].clone()
            _save(state, tensors, progress)
            saved = time.time()


def _save(path: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"progress": json.dumps(progress)})
    part.replace(path)


def _log(out: Path, line: dict[str, Any]) -> None:
    with open(out / "train_log.jsonl", "a") as file:
        file.write(
            json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
            + "\n"
        )
