"""Tiny models without a layout: soft caps, attention sinks with windows, a picture."""

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0}


def soft_capped():
    config = Gemma2Config(
        **TEXT, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=6
    )
    return Gemma2ForCausalLM(config)


def with_sinks():
    config = GptOssConfig(
        **TEXT, num_local_experts=4, num_experts_per_tok=2, sliding_window=6, attention_bias=True
    )
    return GptOssForCausalLM(config)


def with_a_picture():
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
    }
    vision |= {"patch_size": 14, "image_size": 56, "model_type": "clip_vision_model"}
    config = VipLlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, image_token_index=63,
        vision_feature_layers=[-2, -3],
    )  # fmt: skip
    return VipLlavaForConditionalGeneration(config)
