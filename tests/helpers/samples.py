"""Small samples: pictures of noise with a question, a video, several pictures in one sample."""

import torch
from PIL import Image

import corelens as cl


def picture(seed: int, size=(96, 64)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def sample(
    seed: int = 0, size=(96, 64), question="What digit is on the red circle?", images=1
) -> cl.Sample:
    return cl.Sample(
        images=[picture(seed + i, size) for i in range(images)],
        question=question,
        answer="7",
        regions=[cl.Box(5, 5, 60, 40)],
    )


def video(seed: int) -> cl.Sample:
    frames = [picture(seed + i, (64, 64)) for i in range(4)]
    tube = cl.Tube({1: cl.Box(5, 5, 30, 30), 2: cl.Box(20, 20, 60, 60)})
    return cl.Sample(video=frames, question="When?", answer="2", regions=[tube], id=f"video-{seed}")


def mixed() -> list[cl.Sample]:
    samples = [sample(0), sample(1, (128, 96), "Which colour?", images=2), sample(7, (64, 64))]
    samples[1].regions = [cl.Box(3, 3, 50, 50, image=1), cl.Box(40, 40, 90, 60, image=1)]
    for i, sample_ in enumerate(samples):
        sample_.id = f"mixed-{i}"
    return samples


def many() -> list[cl.Sample]:
    samples = []
    for i in range(4):
        for sample_ in mixed():
            sample_.id = f"{i}-{sample_.id}"
            sample_.question = f"{sample_.question} {i}"
            sample_.regions = [
                cl.Box(r.x0, r.y0, r.x1, r.y1, image=r.image, text="a 7 b") for r in sample_.regions
            ]
            samples.append(sample_)
    return samples
