"""What the rules of `shrink.py` cannot know of a type.

Of each type: `first`, arguments of the default config; `set`, entries by the path of the dict that
holds them; `without`, entries that are taken out; `plain`, whether its class is called on the
config.
"""

from typing import Any

GRID = [[56, 112], [112, 56], [112, 112]]


def rope(*sections: int, share: float = 1.0) -> dict[str, Any]:
    """Rotary embeddings whose three or four sections these are."""
    settings = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    return {"rope_parameters": settings | ({"mrope_section": list(sections)} if sections else {})}


HALF = {"set": {"text_config": rope(2, 1, 1, share=0.5)}}
WHOLE = {"set": {"text_config": rope(4, 2, 2)}}
FOUR = {"set": {"": {"latent_query_num": 4}}}
LARGE = {"set": {"vision_config": {"image_size": 256}}}  # (below, a token would be all there is)
TILES = {"set": {"": {"image_grid_pinpoints": GRID}}}
# an image's codes and the tokens that stand for them, of models that see pictures as discrete codes
CODES = {
    f"IMGIMG{a}{b}Z": 300 + 8 * i + j
    for i, a in enumerate("ABCDEFGH")
    for j, b in enumerate("ABCDEFGH")
}
CONV = {"base_channels": 32, "num_res_blocks": 1, "latent_channels": 32, "embed_dim": 32}
GEMMA4_TOWER = {
    "model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "patch_size": 4,
    "pooling_kernel_size": 2, "position_embedding_size": 64,
}  # fmt: skip
UNIFIED_TOWER = {
    "mm_embed_dim": 64, "mm_posemb_size": 16, "patch_size": 4, "output_proj_dims": 64,
    "num_soft_tokens": 16, "model_patch_size": 12, "pooling_kernel_size": 3,
}  # fmt: skip
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v", "glmga"), HALF),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "cosmos3_edge",
                     "cosmos3_omni", "glm_ocr", "paddleocr_vl"), WHOLE),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), TILES),
    "mistral_large4": {"set": {"text_config": {"num_key_value_heads": 4}}},
    "kimi_k25": {"set": {"": {"projection_hidden_size": 64}, "vision_config": {"projection_hidden_size": 64},
                         "text_config": {"num_key_value_heads": 4, "head_dim": 8}}},
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), FOUR),
    "instructblipvideo": {"set": {"": {"video_token_index": 401}}},
    "unlimited_ocr": {"set": {"vision_config.sam_config": {"downsample_channels": [32, 64]}}},
    "aria": {"set": {"": {"projector_patch_to_query_dict": {16: 4, 225: 4}}}},
    "apertus1p5": {"set": {
        "": {"image_token_offset": 300, "audio_token_offset": 364},
        "vision_config": {**CONV, "channel_multiplier": [1] * 4, "embed_dim": 4, "latent_channels": 4, "attn_resolutions": [],
                          "codebook_size": 64, "resolution": 16},
        "audio_config": {"codebook_dim": 64},
    }},
    "chameleon": {"set": {
        "": {"vocabulary_map": {"<image>": 500, **CODES}, "image_token_id": 500},
        "vq_config": {**CONV, "channel_multiplier": [1] * 5, "resolution": 128, "num_embeddings": 64},
    }},
    "cohere_compass": {"set": {"text_config": {"rope_parameters": {
        kind: rope(4, 2, 2)["rope_parameters"] for kind in ("sliding_attention", "full_attention")}}}},
    "deepseek_ocr2": {"set": {"vision_config.sam_config": {"downsample_channels": [32, 64]}, "text_config": {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}}},
    "deepseek_vl_hybrid": {"set": {"high_res_vision_config": {"image_size": 256}}},
    "diffusion_gemma": {"set": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}}},
    "emu3": {"set": {
        "": {"image_token_id": 500, "vocabulary_map": {
            "<image>": 500, "<|extra_200|>": 501, **{f"<|visual token {i:06d}|>": 300 + i for i in range(64)}}},
        "vq_config": {**CONV, "channel_multiplier": [1] * 4, "embed_dim": 4, "latent_channels": 4, "codebook_size": 64,
                      "hidden_size": 32, "attn_resolutions": []},
    }},
    "ernie4_5_vl_moe": {"set": {"text_config": rope(3, 3, 2) | {"moe_intermediate_size": [32, 16]}}},
    "fast_vlm": {"set": {"": {"vision_config": {
        "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg", "hidden_size": 256,
        "num_classes": 0, "model_args": {"inference_mode": True, "layers": [1, 1, 1, 1, 1], "embed_dims": [8, 16, 32, 64, 128]}}}}},
    "florence2": {"set": {"vision_config": {
        "embed_dim": [32, 32], "num_heads": [2, 2], "num_groups": [2, 2], "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2],
        "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4, "projection_dim": 64}}},
    "fun_asr_nano": {"set": {"adaptor_config": {"intermediate_size": 16}}},
    "gemma3": {"set": {"": {"mm_tokens_per_image": 4}}},
    "shieldgemma2": {"set": {"": {"mm_tokens_per_image": 4}}},
    "gemma3n": {"set": {
        "": {"vision_soft_tokens_per_image": 16, "image_token_id": 399, "audio_token_id": 398},
        "vision_config": {"architecture": "test_efficientnet", "hidden_size": 256, "vocab_size": 8, "vocab_offset": 400},
        "audio_config": {"vocab_size": 8, "vocab_offset": 504},
        "text_config": {"num_kv_shared_layers": 2, "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
                        "layer_types": ["sliding_attention", "full_attention"] * 2},
    }},
    "gemma4": {"set": {
        "": {"vision_config": GEMMA4_TOWER},
        "text_config": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}}},
    "gemma4_unified": {"set": {"": {"vision_config": UNIFIED_TOWER}}},
    "dots3_note": {"set": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64}, "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64,
        "conv_output_size": 64},
        "text_config": {"per_layer_config": None, "num_key_value_heads": 4}}},
    "glm5_next": {"set": {"text_config": {"num_key_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4, "qk_rope_head_dim": 0, "qk_head_dim": 8}}},
    "granite4_vision": {"set": {
        "": {"downsample_rate": "2/4", "deepstack_layer_map": [[-1, 0], [-2, 1]], "spatial_vision_layer": -1,
             "spatial_target_layers": [2, 3], "use_image_newline_parameter": True, "image_grid_pinpoints": GRID},
        "vision_config": {"patch_size": 14, "image_size": 56}}},
    "hunyuan_vl": {"set": {"text_config": {"head_dim": 16, "rope_parameters": {
        "rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "rope_theta": 10000.0,
        "mrope_section": [2, 2, 2, 2]}}}},
    "hy_v4_vl": {"set": {"text_config": rope(2, 1, 1)}},
    "janus": {"set": {"vq_config": {**CONV, "channel_multiplier": [1, 1]}}},
    "kyutai_speech_to_text": {"set": {"codec_config": {"upsample_groups": 64}}},
    "llama4": {"set": {"vision_config": {"intermediate_size": 256, "pixel_shuffle_ratio": 0.5, "patch_size": 14, "image_size": 56}}},
    "mistral4": {"set": {"": {"num_key_value_heads": 4}}},
    "inkling_mm_model": {"set": {"vision_config": {"patch_size": 40}}},
    "mllama": {"set": {
        "vision_config": {"intermediate_layers_indices": [0], "vision_output_dim": 128, "num_global_layers": 1, "max_num_tiles": 4,
                          "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]]},
        "text_config": {"cross_attention_layers": [1, 3]}}},
    "molmo2": {"set": {
        "vision_config": {"num_position_embeddings": 16, "image_size": [56, 56]}, "adapter_config": {"vision_feature_layer": [-1, -2]}}},
    "muse_glimmer": {"set": {"": {"out_hidden_size": 256}}},
    "muse_spark": {"set": {"": {"out_hidden_size": 256}, "text_config": {"moe_hidden_size": 64}}},
    "phi4_multimodal": {"set": {"audio_config": {
        "num_blocks": 2, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 64}}},
    "pp_formulanet": {"set": {"vision_config": {"decoder_hidden_size": 64}, "": {}}},
    "step3p7": {"set": {"text_config": {"sliding_window": 8}, "vision_config": {"image_size": 224}}},
    **dict.fromkeys(("got_ocr2", "pp_chart2table"), LARGE),
    "granite_docling": {"set": {"vision_config": {"image_size": 128}}},
    "nemo_speechlm": {"set": {"audio_config.diarization_config.head_config": {"audio_hidden_size": 64}}},
    "perception_lm": {"set": {"": {"projector_pooling_ratio": 1, "vision_use_cls_token": False, "vision_config": {
        "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": True, "num_classes": 0,
        "global_pool": "map", "initializer_range": 0.02, "model_args": {
            "embed_dim": 64, "img_size": [56, 56], "depth": 2, "num_heads": 4, "global_pool": "", "use_post_transformer_norm": False,
            "init_values": 0.1, "ref_feat_shape": [1, 1]}}}}},
    "qwen2_5_omni": {"plain": True, "set": {
        "": {"enable_audio_output": False}, "thinker_config.text_config": rope(4, 2, 2),
        "thinker_config": {"vision_start_token_id": 490, "vision_end_token_id": 491, "audio_start_token_id": 492,
                           "audio_end_token_id": 493}}},
    "qwen3_omni_moe": {"plain": True, "without": ["talker_config", "code2wav_config"], "set": {
        "": {"enable_audio_output": False}, "thinker_config.text_config": rope(4, 2, 2),
        "thinker_config": {"vision_start_token_id": 490, "vision_end_token_id": 491, "audio_start_token_id": 492,
                           "audio_end_token_id": 493}}},
    "qwen2_5_omni_thinker": {"set": {
        "": {"vision_start_token_id": 490, "vision_end_token_id": 491, "audio_start_token_id": 492, "audio_end_token_id": 493},
        "text_config": rope(4, 2, 2)}},
    "qwen3_omni_moe_thinker": {"set": {
        "": {"vision_start_token_id": 490, "vision_end_token_id": 491, "audio_start_token_id": 492, "audio_end_token_id": 493},
        "text_config": rope(4, 2, 2)}},
    "qwen4_exp": {"set": {"text_config": {
        **rope(2, 1, 1, share=0.5), "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "hc_count": 4, "hc_lowrank": 8, "ple_embed_dim": 64, "ngram_vocab_size_base": 101,
        "split_ngram_parts": 2}}},
    "vibevoice_asr": {"set": {
        name: {"depths": [1] * 7, "num_filters": 2, "hidden_size": 16} for name in
        ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config")}},
}  # fmt: skip
