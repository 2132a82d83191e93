"""Which steps of a generation copy text out of a region: the common ground of `retrieval` and
`visual_head`."""

from collections.abc import Sequence

from corelens.errors import CorelensError
from corelens.tokens.regions import no_region
from corelens.tokens.token_map import TokenMap


def copied_regions(
    steps: Sequence[str], texts: Sequence[str | None], token_map: TokenMap
) -> list[list[int]]:
    """For every generated token the regions whose text contains it; surrounding blanks do not
    count.

    Args:
        steps: the text of each generated token; special tokens as "".
        texts: the text of each of the sample's regions, in their order.
    Raises:
        CorelensError: no region, or a region without text.
    """
    if not token_map.regions:
        raise no_region(token_map.id)
    for i, text in enumerate(texts):
        if not text:
            raise CorelensError(
                f"{token_map.label}: region {i} without text",
                "the text that stands in each region",
                'Box(x0, y0, x1, y1, text="Total 7")',
            )
    if len(texts) != len(token_map.regions):
        raise CorelensError(
            f"{token_map.label}: {len(texts)} texts for {len(token_map.regions)} regions",
            "one a region",
            "check",
        )

    def holding(word: str) -> list[int]:
        return [i for i, text in enumerate(texts) if word and word in str(text)]

    return [holding(step.strip()) for step in steps]
