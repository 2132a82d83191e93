"""Which token is which part of which picture: token maps, regions, positions. Pure geometry, no
model."""
