"""Pictures and videos whose message limits their pixels: each is processed by itself, then the
batch is joined.

A processor takes one limit for all pictures of a call. So each picture goes through it alone, under
its own limits; blank pictures of the sizes that come out stand in its place in the batch's call,
which writes the prompt; then the pixels of the first calls replace those of the blanks.

The words `min_pixels` and `max_pixels` are those of qwen-vl-utils, where a video's limits count for
each of its frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from corelens.errors import CorelensError
from corelens.inputs.media import Medium

# kind → (the pixels, the grids of patches) among a processor's tensors
TENSORS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


@dataclass
class Apart:
    """What was processed picture by picture.

    Args:
        standins: per prompt its pictures, with blanks in place of those of these kinds.
        pixels: {kind: patches of all pictures of this kind, in the order of the batch}.
        grids: {kind: [picture, 3], temporal steps, rows and columns of patches}.
    """

    standins: list[list[Any]]
    pixels: dict[str, Float[Tensor, "patch d_patch"]]
    grids: dict[str, Int[Tensor, "picture 3"]]

    def put_into(self, output: dict[str, Any]) -> None:
        """Replace the blanks' pixels in the batch's output by those of the pictures."""
        for kind, (pixels, grids) in TENSORS.items():
            if kind not in self.pixels:
                continue
            if not torch.equal(output[grids], self.grids[kind]):
                raise CorelensError(
                    f"{kind}s whose grids of patches are {self.grids[kind].tolist()} alone and "
                    f"{output[grids].tolist()} in a batch",
                    "a processor that leaves a picture of whole patches at its size",
                    "leave min_pixels and max_pixels out, and resize the pictures yourself",
                )
            output[pixels] = self.pixels[kind]


def process_apart(
    processor: Any,
    media: Sequence[Sequence[Medium]],
    pictures: Sequence[Sequence[Any]],
    images_kwargs: dict[str, Any],
    as_videos: Callable[[list[Image.Image], Medium], dict[str, Any]],
) -> Apart | None:
    """Process each picture alone, where one of the batch has limits; None where none has.

    Args:
        processor: the model's processor.
        media: per prompt its pictures and videos, with what is said of them.
        pictures: the same as images and lists of frames.
        images_kwargs: options of the image processor for all images.
        as_videos: the arguments with which a processor is given one video.

    Errors: an image processor that has no such limits; limits that contradict each other.
    """
    kinds = {medium.kind for row in media for medium in row if any(medium.limits)}
    if not kinds:
        return None
    standins = [list(row) for row in pictures]
    processed: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in kinds}
    for row, of_prompt in enumerate(media):
        for index, medium in enumerate(of_prompt):
            if medium.kind not in kinds:
                continue
            picture = pictures[row][index]
            if medium.kind == "image":
                pixels, grid = _image(processor, picture, images_kwargs | _size(processor, medium))
                standins[row][index] = _blank(processor.image_processor, grid)
            else:
                pixels, grid = _video(processor, picture, medium, images_kwargs, as_videos)
                standins[row][index] = [_blank(processor.video_processor, grid)] * len(picture)
            processed[medium.kind].append((pixels, grid))
    pixels_of, grids_of = {}, {}
    for kind, pairs in processed.items():
        pixels_of[kind] = torch.cat([pixels for pixels, _ in pairs])
        grids_of[kind] = torch.cat([grid for _, grid in pairs])
    return Apart(standins, pixels_of, grids_of)


def _image(
    processor: Any, image: Image.Image, options: dict[str, Any]
) -> tuple[Float[Tensor, "patch d_patch"], Int[Tensor, "1 3"]]:
    output = processor.image_processor(images=[image], return_tensors="pt", **options)
    return output["pixel_values"], output["image_grid_thw"]


def _video(
    processor: Any,
    frames: list[Image.Image],
    medium: Medium,
    images_kwargs: dict[str, Any],
    as_videos: Callable[[list[Image.Image], Medium], dict[str, Any]],
) -> tuple[Float[Tensor, "patch d_patch"], Int[Tensor, "1 3"]]:
    """A video with limits is resized to what the image processor makes of its first frame under
    them; one without goes as it is."""
    options: dict[str, Any] = {}
    if any(medium.limits):
        limited = images_kwargs | _size(processor, medium)
        size = _blank(processor.image_processor, _image(processor, frames[0], limited)[1]).size
        frames = [frame.resize(size, Image.Resampling.BICUBIC) for frame in frames]
        options["do_resize"] = False
    arguments = as_videos(frames, medium)
    arguments["videos"] = arguments["videos"][0]
    output = processor.video_processor(return_tensors="pt", **arguments, **options)
    return output["pixel_values_videos"], output["video_grid_thw"]


def _blank(processor: Any, grid: Int[Tensor, "1 3"]) -> Image.Image:
    """A black picture that fills this grid of patches."""
    _, rows, columns = grid[0].tolist()
    return Image.new("RGB", (columns * processor.patch_size, rows * processor.patch_size))


def _size(processor: Any, medium: Medium) -> dict[str, Any]:
    """The image processor's option for a picture's limits; {} without any."""
    least, most = medium.limits
    if least is None and most is None:
        return {}
    if least is not None and most is not None and least > most:
        raise CorelensError(
            f"min_pixels={least} and max_pixels={most} of one {medium.kind}",
            "a smallest number of pixels that is at most the largest",
            "exchange them",
        )
    images = getattr(processor, "image_processor", None)
    takes = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
    usual = dict(getattr(images, "size", None) or {})
    if "max_pixels" not in takes or not {"shortest_edge", "longest_edge"} <= usual.keys():
        raise CorelensError(
            f"min_pixels or max_pixels in a message for {type(images).__name__}, which has no such "
            "limits",
            "a message without them for this model",
            "leave them out, or say resized_height and resized_width",
        )
    shortest = least or min(usual["shortest_edge"], most or usual["shortest_edge"])
    longest = most or max(usual["longest_edge"], shortest)
    return {"size": usual | {"shortest_edge": shortest, "longest_edge": longest}}
