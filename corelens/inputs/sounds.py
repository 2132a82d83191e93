"""Reading sounds: what a Sample holds becomes a mono waveform and its sampling rate, or an error
that says which one is broken."""

import inspect
import os
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from corelens.errors import CorelensError
from corelens.inputs.pictures import check_file


@dataclass(frozen=True, eq=False)
class Sound:
    """A mono waveform of float32 numbers, most of them in [−1, 1], and how many of them make a
    second."""

    waveform: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.waveform) / self.rate


def is_sound(value: Any) -> bool:
    """Whether this is one sound, (waveform, rate) or a path, and no list of them."""
    if isinstance(value, str | os.PathLike):
        return True
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Real)


def read_sound(sound: Any, where: str) -> Sound:
    """A mono Sound from (waveform, rate) or the path of a WAV file.

    Args:
        sound: the waveform is an array or tensor [sample] or [channel, sample]; channels are
            averaged. Whole numbers are scaled by their type's range, as WAV files hold them.
        where: for messages.
    """
    if isinstance(sound, str | os.PathLike):
        check_file(sound, where)
        return _read_wav(sound, where)
    if not is_sound(sound):
        raise CorelensError(
            f"{where} is of type {type(sound).__name__}",
            "(waveform, rate): an array of samples and how many make a second; or the path of a "
            "WAV file",
            "say the sampling rate beside the waveform",
        )
    waveform, rate = np.asarray(sound[0]), int(sound[1])
    if waveform.ndim == 2:
        waveform = _scaled(waveform).mean(0 if waveform.shape[0] <= waveform.shape[1] else 1)
    if waveform.ndim != 1 or not len(waveform) or waveform.dtype.kind not in "iuf" or rate < 1:
        raise CorelensError(
            f"{where}: a waveform of shape {waveform.shape} and type {waveform.dtype} at {rate} Hz",
            "one number a sample, [sample] or [channel, sample], and a rate above 0",
            "give (waveform, rate)",
        )
    waveform = _scaled(waveform)
    if not np.isfinite(waveform).all():
        raise CorelensError(
            f"{where}: a waveform with NaN or infinity", "finite numbers", "check how it was made"
        )
    return Sound(np.ascontiguousarray(waveform), rate)


def check_sounds(processor: Any, sounds: Sequence[Sound]) -> None:
    """Raise for a sound that a processor does not take: it has no ear, or another sampling rate."""
    if not sounds:
        return
    hears = _ear(processor)
    if hears is None:
        raise CorelensError(
            f"a sound for {type(processor).__name__}, which takes none",
            "a model whose processor has a feature extractor for sounds",
            "leave the audio out, or use a model that hears",
        )
    rate = sampling_rate(processor)
    for sound in sounds:
        if sound.rate != rate:
            raise CorelensError(
                f"a sound of {sound.rate} samples a second for {type(hears).__name__}, which takes "
                f"{rate}",
                f"{rate} samples a second",
                "resample it first, for instance with scipy.signal.resample_poly(waveform, "
                f"{rate}, {sound.rate}) or torchaudio.functional.resample; spans in seconds stay "
                "as they are",
            )


def sampling_rate(processor: Any) -> int:
    """How many samples a second a processor takes."""
    # (one that does not say it: what speech models take)
    return int(getattr(_ear(processor), "sampling_rate", None) or 16000)


def frame_step(processor: Any) -> int:
    """How many samples lie between two frames of a processor's features; 1 if it does not say."""
    return int(getattr(_ear(processor), "hop_length", None) or 1)


def ear_options(processor: Any) -> dict[str, Any]:
    """The options of a processor's feature extractor for sounds."""
    return _ear(processor).to_dict()


def _ear(processor: Any) -> Any:
    """What makes features of sounds in a processor; None where nothing does."""
    return getattr(processor, "audio_processor", None) or getattr(
        processor, "feature_extractor", None
    )


def spoken(processor: Any, waveforms: Sequence[np.ndarray]) -> dict[str, Any]:
    """A processor's arguments for the sounds of a batch, one after the other; {} without any."""
    if not len(waveforms):
        return {}
    takes = inspect.signature(_ear(processor).__call__).parameters
    rate = {"sampling_rate": sampling_rate(processor)} if "sampling_rate" in takes else {}
    return {"audio": list(waveforms)} | ({"audio_kwargs": rate} if rate else {})


def write_wav(sound: Sound, file: str | Path) -> None:
    """Write a sound as a WAV file of 16 bits: a 32768th of the range is lost, and what lies outside
    [−1, 1] is cut."""
    samples = (sound.waveform.clip(-1, 1) * 32767).round().astype("<i2")
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(sound.rate)
        out.writeframes(samples.tobytes())


def _scaled(waveform: np.ndarray) -> np.ndarray:
    if waveform.dtype.kind == "u":
        half = (np.iinfo(waveform.dtype).max + 1) // 2
        return (waveform.astype(np.float32) - half) / half
    if waveform.dtype.kind == "i":
        return waveform.astype(np.float32) / (np.iinfo(waveform.dtype).max + 1)
    return waveform.astype(np.float32)


def _read_wav(path: Any, where: str) -> Sound:
    try:
        with wave.open(os.fspath(path), "rb") as file:
            width, channels, rate = (
                file.getsampwidth(),
                file.getnchannels(),
                file.getframerate(),
            )
            data = file.readframes(file.getnframes())
        if width == 3:  # 24 bits: into the upper three of four bytes
            four = np.zeros((len(data) // 3, 4), np.uint8)
            four[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            samples = four.view("<i4")[:, 0]
        else:
            samples = np.frombuffer(data, np.dtype({1: "u1", 2: "<i2", 4: "<i4"}[width]))
        if not len(samples):
            raise ValueError("it holds no sample")
        return read_sound((samples.reshape(-1, channels).T, rate), where)
    except (OSError, EOFError, KeyError, ValueError, wave.Error) as error:
        raise CorelensError(
            f"{where} cannot be read: {type(error).__name__}: {error}",
            "a whole WAV file of whole numbers (PCM)",
            "convert it, or read it with a library of yours and give (waveform, rate)",
        ) from error
