"""Arguments of tiny networks of ComfyUI's true classes, one set for each family of transformers."""

from comfy.ldm.chroma_radiance.model import ChromaRadianceParams

HEADS = {"num_heads": 2, "hidden_size": 32, "mlp_ratio": 2.0, "theta": 10000, "qkv_bias": True}
FLUX = HEADS | {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 24, "depth": 2,
    "depth_single_blocks": 3, "axes_dim": [4, 6, 6], "patch_size": 2, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
FLUX2 = FLUX | {
    "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "axes_dim": [4, 4, 4, 4],
    "patch_size": 1, "qkv_bias": False, "txt_ids_dims": [3], "global_modulation": True,
    "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index",
    "ref_index_scale": 10.0, "guidance_embed": False,
}  # fmt: skip
CHROMA = {k: v for k, v in FLUX.items() if k != "guidance_embed"} | {
    "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "in_dim": 64, "out_dim": 32,
    "hidden_dim": 32, "n_layers": 1,
}  # fmt: skip
RADIANCE = CHROMA | {
    "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 8,
    "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 4, "nerf_tile_size": 0,
    "nerf_final_head_type": "conv", "nerf_embedder_dtype": None, "use_x0": False,
}  # fmt: skip
if "use_sequential_txt_ids" in ChromaRadianceParams.__annotations__:
    RADIANCE["use_sequential_txt_ids"] = False
SD3 = {
    "input_size": None, "pos_embed_scaling_factor": None, "pos_embed_max_size": 16,
    "num_patches": 256, "patch_size": 2, "in_channels": 16, "depth": 1, "num_blocks": 5,
    "adm_in_channels": 32, "qk_norm": "rms", "x_block_self_attn_layers": [0, 1, 2],
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 64},
    },
}  # fmt: skip
AURA = {
    "cond_seq_dim": 24, "dim": 32, "n_heads": 2, "n_layers": 5, "n_double_layers": 2,
    "global_conddim": 32, "max_seq": 256, "in_channels": 4, "out_channels": 4,
}  # fmt: skip
QWEN = {
    "in_channels": 64, "out_channels": 16, "num_layers": 4, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
MAGE = QWEN | {"in_channels": 128, "out_channels": 128}
LENS = {
    "in_channels": 128, "out_channels": 32, "num_layers": 4, "attention_head_dim": 16,
    "num_attention_heads": 2, "enc_hidden_dim": 12, "axes_dims_rope": (4, 6, 6),
    "selected_layer_index": (0, 1),
}  # fmt: skip
LUMINA = {
    "in_channels": 16, "dim": 32, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2,
    "n_kv_heads": 1, "qk_norm": True, "cap_feat_dim": 24, "axes_dims": [4, 6, 6],
    "axes_lens": [300, 512, 512], "multiple_of": 16, "ffn_dim_multiplier": 1.0,
}  # fmt: skip
Z_IMAGE = LUMINA | {
    "dim": 256, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "pad_tokens_multiple": 8,
    "z_image_modulation": True, "time_scale": 1000.0,
}  # fmt: skip
HUNYUAN = FLUX | {
    "patch_size": [1, 2, 2], "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
    "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
HUNYUAN.pop("txt_ids_dims")
HUNYUAN_IMAGE = HUNYUAN | {
    "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [8, 8],
    "vec_in_dim": None, "guidance_embed": False,
}  # fmt: skip
WAN = {
    "model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 32, "ffn_dim": 64, "freq_dim": 32,
    "text_dim": 24, "num_heads": 2, "num_layers": 4,
}  # fmt: skip
LTXV = {
    "in_channels": 128, "cross_attention_dim": 32, "attention_head_dim": 16,
    "num_attention_heads": 2, "caption_channels": 24, "num_layers": 4,
}  # fmt: skip
COSMOS = {
    "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 48, "num_blocks": 4,
    "num_heads": 2, "crossattn_emb_channels": 24, "pos_emb_cls": "rope3d", "mlp_ratio": 2.0,
}  # fmt: skip
COSMOS_1 = COSMOS | {
    "block_x_format": "THWBD", "use_adaln_lora": True, "adaln_lora_dim": 8,
    "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable", "pos_emb_learnable": False,
}  # fmt: skip
KANDINSKY = {
    "in_text_dim": 24, "in_text_dim2": 32, "time_dim": 32, "model_dim": 32, "ff_dim": 64,
    "visual_embed_dim": 132, "axes_dims": (4, 6, 6), "num_text_blocks": 1, "num_visual_blocks": 4,
}  # fmt: skip
KREA = {
    "features": 32, "tdim": 16, "txtdim": 12, "heads": 2, "kvheads": 1, "multiplier": 2,
    "layers": 4, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2, "default_ref_method": "index",
}  # fmt: skip
JOY = {
    "hidden_size": 32, "num_attention_heads": 2, "text_dim": 24, "mlp_width_ratio": 2.0,
    "num_layers": 4, "rope_dim_list": [4, 6, 6], "theta": 256,
}  # fmt: skip
HIDREAM = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2,
    "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
    "caption_channels": [24, 24], "text_emb_dim": 32, "num_routed_experts": 2,
    "num_activated_experts": 1, "axes_dims_rope": [4, 6, 6], "max_resolution": [64, 64],
    "llama_layers": [0, 1, 2, 0, 1],
}  # fmt: skip
OMNIGEN = {
    "hidden_size": 48, "num_layers": 4, "num_refiner_layers": 1, "num_attention_heads": 2,
    "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (8, 8, 8), "text_feat_dim": 24,
}  # fmt: skip
BOOGU = {k: v for k, v in OMNIGEN.items() if k != "text_feat_dim"} | {
    "num_layers": 3, "num_double_stream_layers": 2, "instruction_feat_dim": 24,
}  # fmt: skip
COG = {
    "num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 32,
    "text_embed_dim": 24, "num_layers": 4, "use_rotary_positional_embeddings": True,
}  # fmt: skip
IDEOGRAM = {
    "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16, "intermediate_size": 64,
    "adaln_dim": 16, "llm_features_dim": 24, "mrope_section": (4, 2, 2),
}  # fmt: skip
PIXELDIT = {
    "num_groups": 2, "hidden_size": 32, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 32,
    "pixel_num_groups": 2, "patch_depth": 3, "pixel_depth": 2, "txt_embed_dim": 24,
    "txt_max_length": 32,
}  # fmt: skip
MOCHI = {
    "in_channels": 12, "hidden_size_x": 32, "hidden_size_y": 24, "depth": 4, "num_heads": 2,
    "mlp_ratio_x": 384.0, "mlp_ratio_y": 256.0, "use_t5": True, "t5_feat_dim": 24, "qk_norm": True,
    "t5_token_length": 7, "learn_sigma": False, "attn_drop": 0.0, "qkv_bias": False,
    "out_bias": True, "rope_theta": 10000.0, "timestep_scale": 1000.0,
}  # fmt: skip
