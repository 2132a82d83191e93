"""From a question and its pictures to what a model runs on: samples, prompts, processing,
pictures."""
